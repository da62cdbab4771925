"""Three coordinators behind one address, on PostgreSQL and S3: one is killed, the database restarts in mid-round."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from coordinator.admin.client import AdminClient, connect
from coordinator.config import run_config
from coordinator.rounds.summary import RunSummary
from edge_runtime.errors import CoordinatorError
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import write_package
from tests.coordinator.storage.servers import (
    BUCKET,
    CREDENTIALS,
    PostgresServer,
    needs_postgres,
    postgres_server,
    shared_s3,
)
from tests.end_to_end.harness import ROOT, to_toml, wait_for
from tests.faults.cutting_proxy import read_message
from tests.faults.small_fleet import NAMES, PATIENCE_S, SETTINGS, SPECS, undisturbed

pytestmark = needs_postgres


class Balancer:
    """One address for several coordinators: each request goes to the next one that takes a connection."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self._turns = count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            incoming = client.makefile("rb")
            while request := read_message(incoming):
                turn = next(self._turns)
                for port in self.ports[turn % len(self.ports) :] + self.ports[: turn % len(self.ports)]:
                    try:
                        server = socket.create_connection(("127.0.0.1", port))
                    except OSError:
                        continue  # it was killed
                    with server:
                        server.sendall(request)
                        answer = read_message(server.makefile("rb"))
                    if not answer:
                        return  # it was killed in between: the client is told by a closed connection
                    client.sendall(answer)
                    break


@dataclass
class SeveralCoordinators:
    """Processes that share a database and a bucket.

    Attributes:
        folder: folder of all of them.
        server: their database's server.
        balancer: their one address.
        coordinators: the daemons, by number.
        devices: the agents.
    """

    folder: Path
    server: PostgresServer
    database: str
    balancer: Balancer
    coordinators: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    devices: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def admin(self) -> AdminClient:
        """The operator's client, through the one address."""
        return connect(None, self.balancer.url, self.folder / "secrets" / "admin.token", None)

    def start_coordinator(self, number: int) -> None:
        """Start a daemon."""
        state = self.folder / f"state-{number}"
        words = ["serve", "--state", str(state), "--port", "0", "--secrets", str(self.folder / "secrets")]
        words += ["--database", self.server.url(self.database)]
        words += ["--blobs", f"s3://{BUCKET}/{self.folder.name}?endpoint={shared_s3()}", "--direct-blobs"]
        with self.log(number).open("wb") as log:
            self.coordinators[number] = subprocess.Popen(
                [sys.executable, "-m", "coordinator.cli", *words],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **CREDENTIALS},
            )

    def find_coordinator(self, number: int) -> None:
        """Wait until a daemon has its address, and make it known."""
        url = self.folder / f"state-{number}" / "url"
        wait_for("a coordinator", url.exists)
        self.balancer.ports.append(int(urlsplit(url.read_text().strip()).port or 0))

    def start_device(self, name: str, publisher_key: str) -> None:
        """Make an agent's folder, and start it."""
        (self.folder / name).mkdir()
        (self.folder / name / "data.jsonl").write_text('{"text": "a", "label": "yes"}\n' * 20)
        table: dict[str, object] = {
            "coordinator_url": self.balancer.url,
            "state_folder": "state",
            "data": "data.jsonl",
            "device_name": name,
            "device_class": "test",
            "publisher_key": publisher_key,
            "enrolment_token": self.admin.create_token(),
            "cap": "1G",
        }
        (self.folder / name / "device.toml").write_text(to_toml(table))
        words = [sys.executable, "-m", "tests.faults.small_device", str(self.folder / name)]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.devices.append(subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT))

    def log(self, number: int) -> Path:
        """Log of a daemon."""
        return self.folder / f"coordinator-{number}.log"

    def leaders(self) -> list[int]:
        """Numbers of the daemons that began to play the rounds, those that are alive."""
        return [
            number
            for number, process in self.coordinators.items()
            if process.poll() is None and "leads claim=" in self.log(number).read_text()
        ]

    def stop(self) -> None:
        """End all processes."""
        for process in [*self.devices, *self.coordinators.values()]:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()
        self.balancer.close()


@contextmanager
def several(folder: Path) -> Iterator[SeveralCoordinators]:
    """Three coordinators that serve, until the end of the block."""
    folder.mkdir()
    with postgres_server() as server:
        server.fresh("fleet")
        found = SeveralCoordinators(folder, server, "fleet", Balancer())
        try:
            for number in range(3):
                found.start_coordinator(number)  # all at once, on an empty database without a key
            for number in range(3):
                found.find_coordinator(number)
            yield found
        finally:
            found.stop()


def test_one_is_killed_and_the_database_restarts(tmp_path: Path) -> None:
    """Of three coordinators the one that plays the rounds is killed and the database restarts in mid-round: another
    plays on, nothing is lost or counted twice, and the run ends in the bits of one process on SQLite."""
    key = generate_key()
    package = write_package(tmp_path / "package", key, SPECS)
    with several(tmp_path / "fleet") as fleet:
        (leader,) = wait_for("one to lead", fleet.leaders)
        for name in NAMES:
            fleet.start_device(name, key.public_key)
        for name in NAMES:
            wait_for("a device to enrol", (fleet.folder / name / "state" / "identity.json").exists)
        table = {**SETTINGS, "package": str(package), "publisher_key": key.public_key, "seed": 3}
        run_id = fleet.admin.create_run(run_config(table))
        wait_for("a round", lambda: fleet.admin.run(run_id).rounds)
        fleet.coordinators[leader].kill()
        wait_for("another to lead", lambda: set(fleet.leaders()) - {leader})
        wait_for("a result", lambda: any(entry.results for entry in fleet.admin.run(run_id).rounds))
        fleet.server.stop()
        fleet.server.start()
        deadline_s = time.monotonic() + PATIENCE_S
        while (run := _run(fleet, run_id)) is None or run.state == "running":
            assert time.monotonic() < deadline_s, fleet.log((leader + 1) % 3).read_text()[-3000:]
            time.sleep(0.05)
        assert run.state == "finished", run.reason
        assert [(entry.state, entry.results) for entry in run.rounds] == [("committed", 2)] * 3
        assert fleet.admin.slices(run_id) == undisturbed(tmp_path / "undisturbed", seed=3)
        with psycopg.connect(fleet.server.url("fleet")) as connection:
            counted = connection.execute("SELECT count(*) FROM results JOIN tasks USING (task_id)").fetchone()
            # What was killed between counting and clearing up leaves parts to the next sweep, of counted results alone.
            undecided = connection.execute(
                "SELECT count(*) FROM upload_parts WHERE task_id NOT IN (SELECT task_id FROM results)"
            ).fetchone()
        assert (counted, undecided) == ((6,), (0,))
        alive = [number for number, process in fleet.coordinators.items() if process.poll() is None]
        assert alive == [number for number in range(3) if number != leader]
        logs = "".join(fleet.log(number).read_text() for number in range(3))
        assert "crashed method" not in logs
        assert "loop_ended" not in logs
        assert "trouble where=" in logs


def _run(fleet: SeveralCoordinators, run_id: str) -> RunSummary | None:
    """A run as it stands; None while no coordinator can tell."""
    with suppress(CoordinatorError):
        return fleet.admin.run(run_id)
    return None
