"""A coordinator and its devices as real processes on loopback, to be started, watched, frozen and killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import urllib3

from coordinator.admin.client import AdminClient, connect
from edge_runtime.errors import CoordinatorError

if TYPE_CHECKING:
    from coordinator.rounds.summary import EventSummary, RunSummary
    from tests.end_to_end.workshop import Exported, Rows

ROOT = Path(__file__).parents[2]
#: Longest wait for anything; only a fault lasts so long.
PATIENCE_S = 180.0
RUN: dict[str, object] = {
    "name": "tiny",
    "seed": 5,
    "rounds": 3,
    "devices_per_round": 2,
    "min_devices": 3,
    "min_results": 2,
    "split": "cyclic",
    "selection_timeout_s": PATIENCE_S,
    "deadline_s": PATIENCE_S,
    "poll_min_s": 0.1,
    "poll_max_s": 0.2,
    "steps": 4,
    "batch_size": 8,
    "draws": 2,
    "sequence_limit": 32,
    "local_optimizer": {"name": "accumulate", "slice_rate": 0.02, "head_rate": 0.01},
}
T = TypeVar("T")


def command(*parts: object, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """Run one of the product's commands to its end."""
    words = [sys.executable, "-m", *map(str, parts)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=patience_s, check=False)


def wait_for(what: str, look: Callable[[], T], logs: Path | None = None) -> T:
    """Poll until ``look`` gives something true, and return that; else fail, with the ends of the logs."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.02)
    tails = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(logs.rglob("*.log"))] if logs else []
    raise AssertionError("\n".join([f"waited {PATIENCE_S:.0f} s for {what}", *tails]))


def to_toml(settings: dict[str, object]) -> str:
    """A TOML document; tables of tables are written inline."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in settings.items())


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(str(value) if isinstance(value, Path) else value)


@dataclass
class Program:
    """A long-running command in a process group of its own, behind a prefix; its output goes to ``log``."""

    words: tuple[str, ...]
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    prefix: tuple[str, ...] = ()

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", *self.words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def children(self) -> list[psutil.Process]:
        """The worker processes it runs at this moment."""
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children():
                with suppress(psutil.Error):
                    if "edge_runtime.worker.main" in child.cmdline():
                        found.append(child)
        return found

    def kill(self, *, with_children: bool = True) -> None:
        """``kill -9``: the program with its children, as a power cut would, or it alone."""
        with suppress(ProcessLookupError):
            if with_children:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, as a service manager would; returns the exit code."""
        self._process.terminate()
        return self._process.wait(PATIENCE_S)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process


@dataclass
class Device:
    """One device: its folder holds its configuration, its rows, its state and its log."""

    name: str
    folder: Path
    program: Program

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.program.log.read_text()

    @property
    def pending(self) -> Path:
        """Where a result waits that is not acknowledged."""
        return self.folder / "state" / "pending.result"


class Fleet:
    """A coordinator, its devices and an operator; a context manager that leaves no process behind.

    Args:
        folder: everything is kept here.
        package: what runs train.
        audit: note which files the devices' processes open, in ``audit.log`` of each device's folder.
        options: further options of the coordinator.
    """

    def __init__(
        self, folder: Path, package: Exported, *, audit: bool = False, options: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self.package = package
        self.state = folder / "coordinator"
        self.devices: dict[str, Device] = {}
        self._audit = audit
        self._options = options
        self._port = 0
        self.device_url = ""
        folder.mkdir(parents=True, exist_ok=True)
        self.coordinator = self._program("coordinator.log")
        self.start_coordinator()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for program in [*(device.program for device in self.devices.values()), self.coordinator]:
            program.kill()

    # --- coordinator ---

    def start_coordinator(self) -> None:
        """Start it, or start it again on the same state folder and port."""
        self.coordinator.words = (
            *("coordinator.cli", "serve"),
            *("--state", str(self.state), "--port", str(self._port)),
            *self._options,
        )
        self.coordinator.start()
        self.wait("the coordinator", self._answers)
        self.device_url = self.device_url or self.url
        self._port = int(self.url.rpartition(":")[2])

    @property
    def url(self) -> str:
        """The coordinator's address."""
        return (self.state / "url").read_text().strip()

    @property
    def admin(self) -> AdminClient:
        """The operator's client."""
        return connect(self.state, None, None, None)

    def operate(self, *words: object) -> subprocess.CompletedProcess[str]:
        """An ``edge-coordinator`` command against this coordinator."""
        return command("coordinator.cli", *words, "--state", self.state)

    def create_run(self, **changes: object) -> str:
        """Queue a run by ``run create``; returns its id."""
        done = self.operate("run", "create", self.write_run(**changes))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def write_run(self, **changes: object) -> Path:
        """Write run.toml."""
        base = {"package": self.package.folder, "publisher_key": self.package.publisher_key, **RUN}
        path = self.folder / "run.toml"
        path.write_text(to_toml({**base, **changes}))
        return path

    def run(self) -> RunSummary:
        """The newest run."""
        return self.admin.run()

    def events(self, device: str, code: str) -> list[EventSummary]:
        """Events of a device with a code, so far."""
        return [event for event in self.admin.events() if (event.device, event.code) == (device, code)]

    def wait_until_finished(self) -> RunSummary:
        """Wait for the run's end, across restarts of the coordinator; it must have finished."""

        def ended() -> RunSummary | None:
            with suppress(CoordinatorError):
                run = self.run()
                return None if run.state in {"queued", "running", "evaluating"} else run
            return None

        run = self.wait("the run's end", ended)
        assert run.state == "finished", run.reason
        return run

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Rows of the coordinator's database."""
        with closing(
            sqlite3.connect(f"file:{self.state / 'coordinator.db'}?mode=ro", uri=True)
        ) as connection:
            return connection.execute(sql).fetchall()

    # --- devices ---

    def add_device(self, name: str, rows: Rows, **settings: object) -> Device:
        """Give a device its folder, rows and token, and start its agent.

        Its arithmetic is set: which is fastest at some moment is not the same twice on a busy machine.
        """
        folder = self.folder / "devices" / name
        folder.mkdir(parents=True)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        config = {
            "coordinator_url": self.device_url,
            "state_folder": "state",
            "data": "data.jsonl",
            "device_name": name,
            "device_class": "test",
            "publisher_key": self.package.publisher_key,
            "enrolment_token": self.admin.create_token(),
            "cap": "1G",
            "arithmetic": "row_int8",
            **settings,
        }
        (folder / "device.toml").write_text(to_toml(config))
        program = self._program(
            f"devices/{name}/device.log", "edge_runtime.cli", "run", "--config", str(folder / "device.toml")
        )
        if self._audit:
            program.environment["AUDIT_LOG"] = str(folder / "audit.log")
            program.environment["PYTHONPATH"] = os.pathsep.join(
                [str(ROOT / "tests/end_to_end/audit"), str(ROOT)]
            )
        self.devices[name] = Device(name, folder, program)
        program.start()
        return self.devices[name]

    def freeze_a_worker(self) -> tuple[Device, psutil.Process]:
        """Wait until some device trains and stop its worker in its tracks: the task stays open until told."""

        def freeze() -> tuple[Device, psutil.Process] | None:
            for device in self.devices.values():
                for worker in device.program.children():
                    if _freeze(worker):
                        return device, worker
            return None

        return self.wait("a worker", freeze)

    def wait(self, what: str, look: Callable[[], T]) -> T:
        """Poll until ``look`` gives something true, and return that."""
        return wait_for(what, look, self.folder)

    def _answers(self) -> bool:
        assert self.coordinator.process is not None
        assert self.coordinator.process.poll() is None, self.coordinator.log.read_text()[-2000:]
        with suppress(OSError, urllib3.exceptions.HTTPError), urllib3.PoolManager(retries=False) as pool:
            return pool.request("GET", f"{self.url}/healthz").status == 200
        return False

    def _program(self, log: str, *words: str) -> Program:
        return Program(words, self.folder / log, {})


def _freeze(process: psutil.Process) -> bool:
    """Stop a process; False if it ends before it stands still."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()
        while (status := process.status()) != psutil.STATUS_STOPPED:
            if status == psutil.STATUS_ZOMBIE:
                return False
            time.sleep(0.001)
        return True
    return False
