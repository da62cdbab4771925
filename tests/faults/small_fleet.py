"""A real coordinator and real agents that train by a formula: quick enough to be disturbed hundreds of times.

One run after another goes through whatever is done to them; each must end in the bits of an undisturbed run, which is
played in the test's own process.
"""

from __future__ import annotations

import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from coordinator.admin.client import AdminClient, connect
from coordinator.config import run_config
from coordinator.rounds.summary import RunSummary
from edge_runtime.errors import CoordinatorError
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import RUN, World, slice_spec, write_package
from tests.end_to_end.harness import ROOT, to_toml, wait_for
from tests.faults.cutting_proxy import CUTS, Cut, CuttingProxy, cutting_proxy

NAMES = ("a", "b", "c")
#: Results of 400 kB, which go in two parts.
SPECS = (
    slice_spec("s0", 0, (1, 200, 250)),
    slice_spec("s1", 1, (1, 200, 250)),
    slice_spec("head", 1, (1, 2, 2), "head"),
)
#: Nothing here is late: who sits where hangs on seed and names alone.
SETTINGS: dict[str, Any] = {
    **RUN,
    "rounds": 3,
    "devices_per_round": 2,
    "min_devices": 3,
    "min_results": 2,
    "split": "whole",
    "selection_timeout_s": 600.0,
    "deadline_s": 600.0,
    "poll_min_s": 0.05,
    "poll_max_s": 0.1,
}
#: Few enough for a stranger to use up.
DESCRIPTORS = 256
#: Longest wait for the end of a run that is left alone; only a fault lasts so long.
PATIENCE_S = 90.0


def endless_cuts(source: random.Random, share: float) -> Iterator[Cut | None]:
    """A share of all requests breaks off, somewhere."""
    while True:
        yield source.choice(CUTS) if source.random() < share else None


@dataclass
class SmallFleet:
    """Processes and the way between them.

    Attributes:
        folder: folder of all of them.
        source: source of all chance.
        port: port of the coordinator, the same after each start.
        proxy: way from the devices to the coordinator.
        coordinator: the daemon.
        devices: the agents, by name.
        faults: number of faults so far, by kind.
    """

    folder: Path
    source: random.Random
    port: int = 0
    proxy: CuttingProxy | None = None
    coordinator: subprocess.Popen[bytes] | None = None
    devices: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """State folder of the coordinator."""
        return self.folder / "state"

    @property
    def admin(self) -> AdminClient:
        """The operator's client."""
        return connect(self.state, None, None, None)

    def start_coordinator(self) -> None:
        """Start the daemon, or start it again, and wait until it answers."""
        words = ["coordinator.cli", "serve", "--state", str(self.state), "--port", str(self.port)]
        self.coordinator = self._start(
            words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        )
        wait_for("the coordinator", self.answers)
        self.port = int(urlsplit((self.state / "url").read_text().strip()).port or 0)

    def start_device(self, name: str) -> None:
        """Start an agent, or start it again."""
        self.devices[name] = self._start(["tests.faults.small_device", str(self.folder / name)])

    def all_have_enrolled(self) -> bool:
        """Whether all have; an agent whose enrolment broke off has ended, and is started again as its unit would."""
        lacking = [name for name in NAMES if not (self.folder / name / "state" / "identity.json").exists()]
        for name in lacking:
            if self.devices[name].poll() is not None:
                self.start_device(name)
        return not lacking

    def answers(self) -> bool:
        """Whether the daemon answers; it must be alive."""
        assert self.coordinator is not None
        assert self.coordinator.poll() is None, (self.folder / "log").read_text()[-3000:]
        with suppress(OSError, urllib3.exceptions.HTTPError), urllib3.PoolManager(retries=False) as pool:
            url = (self.state / "url").read_text().strip()
            return pool.request("GET", f"{url}/healthz", timeout=5.0).status == 200
        return False

    def kill_coordinator(self) -> None:
        """SIGKILL, and a new start."""
        assert self.coordinator is not None
        self.coordinator.kill()
        self.coordinator.wait()
        self._count("coordinator killed")
        self.start_coordinator()

    def kill_device(self) -> None:
        """SIGKILL of some agent, and a new start."""
        name = self.source.choice(NAMES)
        self.devices[name].kill()
        self.devices[name].wait()
        self._count("device killed")
        self.start_device(name)

    def kill_both(self) -> None:
        """SIGKILL of the coordinator and some agent at once, and new starts."""
        assert self.coordinator is not None
        name = self.source.choice(NAMES)
        self.coordinator.kill()
        self.devices[name].kill()
        self.coordinator.wait()
        self.devices[name].wait()
        self._count("both killed")
        self.start_device(name)
        self.start_coordinator()

    def hold_lock(self) -> None:
        """Hold the database locked from another process's place, for longer than the coordinator waits, or shorter."""
        other = sqlite3.connect(self.state / "coordinator.db", isolation_level=None, timeout=60.0)
        other.execute("BEGIN IMMEDIATE")
        time.sleep(self.source.choice((0.2, 1.0, 6.0)))
        other.execute("ROLLBACK")
        other.close()
        self._count("lock held")

    def use_up_descriptors(self) -> None:
        """More idle connections than the coordinator has descriptors, for a while."""
        strangers = []
        with suppress(OSError):
            strangers += [
                socket.create_connection(("127.0.0.1", self.port), 5.0) for _ in range(2 * DESCRIPTORS)
            ]
        time.sleep(self.source.uniform(0.0, 1.0))
        for stranger in strangers:
            stranger.close()
        self._count("descriptors used up")

    def create_run(self, package: Path, publisher_key: str, seed: int) -> str:
        """Queue a run."""
        table = {**SETTINGS, "package": str(package), "publisher_key": publisher_key, "seed": seed}
        return self.admin.create_run(run_config(table))

    def summary(self, run_id: str) -> RunSummary | None:
        """A run as it stands; None while the coordinator cannot tell."""
        with suppress(CoordinatorError):
            return self.admin.run(run_id)
        return None

    def stop(self) -> None:
        """End all processes."""
        for process in [*self.devices.values(), *([self.coordinator] if self.coordinator else [])]:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()

    def _count(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1

    def _start(self, words: list[str], **more: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log, cwd=ROOT, **more)


@contextmanager
def small_fleet(folder: Path, *, cut_share: float = 0.0) -> Iterator[SmallFleet]:
    """A coordinator and three agents that have enrolled, until the end of the block.

    Args:
        folder: empty folder.
        cut_share: share of the devices' requests that break off.
    """
    folder.mkdir()
    fleet = SmallFleet(folder, random.Random(11))
    fleet.start_coordinator()
    key = generate_key()
    (folder / "publisher").write_text(key.public_key)
    write_package(folder / "package", key, SPECS)
    with cutting_proxy(fleet.port, endless_cuts(random.Random(12), cut_share)) as proxy:
        fleet.proxy = proxy
        for name in NAMES:
            (folder / name).mkdir()
            (folder / name / "data.jsonl").write_text('{"text": "a", "label": "yes"}\n' * 20)
            table: dict[str, object] = {
                "coordinator_url": proxy.url,
                "state_folder": "state",
                "data": "data.jsonl",
                "device_name": name,
                "device_class": "test",
                "publisher_key": key.public_key,
                "enrolment_token": fleet.admin.create_token(),
                "cap": "1G",
            }
            (folder / name / "device.toml").write_text(to_toml(table))
            fleet.start_device(name)
        try:
            wait_for("all devices to enrol", fleet.all_have_enrolled)
            yield fleet
        finally:
            fleet.stop()


def undisturbed(folder: Path, seed: int) -> bytes:
    """The values in which a run of a seed ends that nobody disturbs."""
    folder.mkdir()
    world = World(folder, specs=SPECS)
    devices = world.fleet(*NAMES)
    world.create_run(**{**SETTINGS, "seed": seed})
    while world.run()["state"] != "finished":
        world.work(devices)
    values = world.values()
    world.stores.storage.close()
    return values


def wait_for_end(fleet: SmallFleet, run_id: str) -> RunSummary:
    """The run once it has ended, left alone; it must have finished."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        run = fleet.summary(run_id)
        if run is not None and run.state not in ("queued", "running"):
            assert run.state == "finished", run.reason
            return run
        time.sleep(0.05)
    raise AssertionError((fleet.folder / "log").read_text()[-5000:])
