"""The agent as it is, with a worker that trains by a formula and prepares nothing: for fleets that are killed often.

    python -m tests.faults.small_device FOLDER

It waits a fifth of a second at most, so that hundreds of faults take minutes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from edge_runtime.agent.client import Client
from edge_runtime.agent.config import load_config
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.enrolment import ensure_identity
from edge_runtime.agent.store import Store
from edge_runtime.agent.transport import HttpTransport
from edge_runtime.log import start_logging
from edge_runtime.worker.jobs import Job
from edge_runtime.worker.process import RunningWorker, start_worker

LONGEST_WAIT_S = 0.2


def main(folder: Path) -> None:
    """Serve the coordinator until somebody ends this process."""
    config = load_config(folder / "device.toml")
    start_logging()
    store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
    transport = HttpTransport(config.coordinator_url)

    def launch(job: Job) -> RunningWorker:
        return start_worker(job, [sys.executable, "-m", "tests.faults.formula_worker", config.device_name])

    with store.locked():
        identity = ensure_identity(config, store, transport)
        client = Client(transport, store.key(), identity.device_id)
        agent = Agent(
            config,
            store,
            client,
            identity,
            launch=launch,
            sleep=lambda seconds: time.sleep(min(seconds, LONGEST_WAIT_S)),
        )
        agent.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
