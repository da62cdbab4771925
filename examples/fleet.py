"""What the demonstrations share: a coordinator and devices as processes of this machine.

They are started by the product's own commands. Every process leaves its log in the output folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Memory that each device's operator grants.
CAP = "256M"


@dataclass(frozen=True)
class Fleet:
    """A running coordinator with its devices.

    Attributes:
        output: folder of the demonstration.
        state: folder of the coordinator, within it.
        url: address of the coordinator.
    """

    output: Path
    state: Path
    url: str

    def visit(self, run_config: Path) -> None:
        """Ask every device once for sums, and watch the head being solved; leaves the report in ``visit/``."""
        run("coordinator.cli", "run", "create", run_config, "--one-visit", "--state", self.state)
        show("coordinator.cli", "run", "watch", "--state", self.state)
        run("coordinator.cli", "run", "report", "--state", self.state, "--output", self.output / "visit")

    def train(self, run_config: Path) -> Path:
        """Create a run and watch it to its end; returns the trained slices, and leaves the report in ``run/``."""
        run("coordinator.cli", "run", "create", run_config, "--state", self.state)
        show("coordinator.cli", "run", "watch", "--state", self.state)
        run("coordinator.cli", "run", "report", "--state", self.state, "--output", self.output / "run")
        slices = self.output / "slices.safetensors"
        run("coordinator.cli", "run", "fetch-slices", "--state", self.state, "--output", slices)
        return slices


def train_on_fleet(
    template: Path,
    output: Path,
    package: Path,
    publisher_key: str,
    data: Sequence[Path],
    dev: Path,
    rounds: int | None,
    *,
    visit: bool = False,
) -> Path:
    """Start a coordinator and a device for each file of rows, and train to the run's end.

    Args:
        template: run.toml with ``data = "dev.jsonl"`` in its table of evaluation.
        output: folder for state, configurations, logs and results.
        package: package to train.
        publisher_key: public key that the package is signed with.
        data: files of rows, each moved into the folder of the device that owns it.
        dev: rows that the coordinator evaluates on.
        rounds: number of rounds in place of the template's; None keeps the template's.
        visit: whether a run comes first that visits each device once for a head in closed form.

    Returns:
        The file of trained slices.
    """
    print("\n3. Coordinator and devices", flush=True)
    with running_fleet(output, publisher_key, data) as fleet:
        print(f"   {fleet.url}, {len(data)} devices", flush=True)
        config = complete_run_config(
            template, output, package, publisher_key, dev, devices=len(data), rounds=rounds
        )
        if visit:
            print("\n4. One visit to each device, without a gradient\n", flush=True)
            fleet.visit(config)
        print(f"\n{5 if visit else 4}. Rounds of forward mode\n", flush=True)
        settings = tomllib.loads(config.read_text())
        if patience := settings.get("patience"):
            most = (
                f"at most {settings['rounds']} rounds, fewer if {patience} evaluations in a row are no better"
            )
            print(f"   Slices, and a head over the last block alone: {most}.\n", flush=True)
        return fleet.train(config)


@contextmanager
def running_fleet(output: Path, publisher_key: str, data: Sequence[Path]) -> Iterator[Fleet]:
    """Serve, and start one device for each file of rows; all processes are gone afterwards.

    Args:
        output: folder for state, configurations and logs.
        publisher_key: public key of the publisher whose packages devices trust.
        data: files of rows, each moved into the folder of the device that owns it.
    """
    state = output / "coordinator"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(
            _start(output / "coordinator.log", "coordinator.cli", "serve", "--state", state, "--port", 0)
        )
        url = _wait_for_url(state, processes[0])
        for number, rows in enumerate(data):
            config = _device_config(output, number, rows, url, publisher_key, state)
            processes.append(
                _start(config.parent / "device.log", "edge_runtime.cli", "run", "--config", config)
            )
        yield Fleet(output, state, url)
    finally:
        _stop(processes)


def complete_run_config(
    template: Path,
    output: Path,
    package: Path,
    publisher_key: str,
    dev: Path,
    *,
    devices: int,
    rounds: int | None,
) -> Path:
    """Write a run.toml completed with this machine's paths; returns it.

    Args:
        template: run.toml with ``data = "dev.jsonl"`` in its table of evaluation.
        output: folder to write it to.
        package: package to train.
        publisher_key: public key that the package is signed with.
        dev: rows that the coordinator evaluates on.
        devices: number of devices in the fleet.
        rounds: number of rounds in place of the template's; None keeps the template's.
    """
    text = template.read_text()
    settings = tomllib.loads(text)
    text = text.replace('data = "dev.jsonl"', f"data = {json.dumps(str(dev))}")
    text = text.replace(f"min_devices = {settings['min_devices']}", f"min_devices = {devices}", 1)
    if rounds is not None:
        text = text.replace(f"rounds = {settings['rounds']}", f"rounds = {rounds}", 1)
    head = f"package = {json.dumps(str(package))}\npublisher_key = {json.dumps(publisher_key)}\n"
    path = output / "run.toml"
    path.write_text(head + text)
    return path


def empty_folder(path: Path) -> Path:
    """Make an empty folder, and remove what was there before; returns its absolute path."""
    folder = path.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run(*parts: object) -> str:
    """Run one of the product's commands and return what it prints."""
    done = subprocess.run(_command(*parts), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, parts[:3]))} failed with exit code {done.returncode}")
    return done.stdout


def show(*parts: object) -> None:
    """Run one of the product's commands on this terminal."""
    done = subprocess.run(_command(*parts), check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, parts[:3]))} failed with exit code {done.returncode}")


def _command(*parts: object) -> list[str]:
    return [sys.executable, "-m", *map(str, parts)]


def _start(log: Path, *parts: object) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(_command(*parts), stdout=file, stderr=subprocess.STDOUT)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for_url(state: Path, process: subprocess.Popen[bytes]) -> str:
    """The running server's address, which it writes into its state folder."""
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit(f"error: the coordinator stopped; see {state.parent / 'coordinator.log'}")
        if (state / "url").is_file() and (url := (state / "url").read_text().strip()):
            return url
        time.sleep(0.1)
    raise SystemExit(f"error: the coordinator did not start; see {state.parent / 'coordinator.log'}")


def _device_config(output: Path, number: int, data: Path, url: str, publisher_key: str, state: Path) -> Path:
    """Make one device's folder, with its configuration and its own rows; returns the configuration."""
    folder = output / "devices" / f"{number:02d}"
    folder.mkdir(parents=True)
    shutil.move(data, folder / "data.jsonl")
    token = run("coordinator.cli", "token", "--state", state).strip()
    settings = {
        "coordinator_url": url,
        "state_folder": "state",
        "data": "data.jsonl",
        "device_name": f"device-{number:02d}",
        "device_class": "demo",
        "publisher_key": publisher_key,
        "enrolment_token": token,
        "cap": CAP,
    }
    config = folder / "device.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return config
