"""Signed check-ins against one coordinator process: how many a second of its CPU, how long each takes, how much memory.

    python -m benchmarks.coordinator.check_ins [--devices 10000] [--requests 30000] [--connections 64]

A coordinator with SQLite serves a fleet that has enrolled, while a run is open whose rounds ask for some of it. All
requests are signed before the clock starts, so that the devices' own work is not in the figures. The coordinator runs
on one core, what sends requests on another. A second of CPU is the coordinator's own, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from urllib.parse import urlsplit

import numpy as np
import psutil

from benchmarks.harness.result_file import RESULTS, figure, write_result
from coordinator.admin.client import connect
from coordinator.config import run_config
from coordinator.storage import device_rows
from coordinator.storage.stores import open_stores
from edge_runtime.package.manifest import (
    FORMAT_VERSION,
    Base,
    FileEntry,
    Manifest,
    Program,
    Segment,
    SelfCheck,
    SizeTerm,
    SliceSpec,
    TensorSpec,
    Variant,
)
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest
from edge_runtime.protocol.signing import PrivateKey, generate_key, sign_request

ROOT = Path(__file__).parents[2]
UNITS = {
    "CPU time of a check-in": "seconds",
    "99 in 100 answered within": "seconds",
    "half answered within": "seconds",
    "memory": "bytes",
}
#: 1,500 check-ins a second of one core, nearly all of them answered within a tenth of a second.
REACH = {"CPU time of a check-in": 1 / 1500, "99 in 100 answered within": 0.1}
SPECS = (
    SliceSpec("block0.query", "lora_xs", (0,), "block0.query", (TensorSpec("core", (1, 4, 4), "c"),)),
    SliceSpec("head", "head", (1,), "classifier", (TensorSpec("core", (1, 2, 2), "h"),)),
)


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        devices: number of enrolled devices, which take turns.
        requests: number of check-ins.
        connections: number of connections that are kept open, each with one request under way.
    """

    devices: int
    requests: int
    connections: int


def write_package(folder: Path, key: PrivateKey) -> Path:
    """A signed package whose programs are never run: check-ins need only its manifest."""
    folder.mkdir()
    initial = {name: np.zeros(shape, np.float32) for name, shape in shapes(SPECS).items()}
    files = {"p.onnx": b"p", "probe.onnx": b"q", "t.json": b"{}", "slices": encode_values(initial)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="load",
        task="classification",
        labels=("no", "yes"),
        sequence_limit=16,
        pad_token_id=0,
        base=Base("bert", "by hand", 100, 4, "none"),
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        programs={
            "p": Program(
                ("hidden",),
                ("hidden",),
                {"float": Variant("p.onnx", (), live=((SizeTerm(64.0, 1, 1, 0),),))},
            )
        },
        segments=(Segment("embed", "p", "p", "p", {}), Segment("head", "p", "p", "p", {})),
        slices=SPECS,
        tokenizer="t.json",
        initial_state="slices",
        self_checks={"float": SelfCheck(1, 0.0, 0.0, 1.0)},
        probe="probe.onnx",
    )
    data = messages.encode(manifest)
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_text(key.sign(data))
    return folder


@contextmanager
def coordinator(state: Path) -> Iterator[psutil.Process]:
    """A coordinator on the first core, ready to serve."""
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", "serve", "--state", str(state), "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),  # noqa: PLW1509
    )
    try:
        while not (state / "url").exists():
            time.sleep(0.05)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def enrol_all(state: Path, count: int, key: PrivateKey) -> list[str]:
    """Enrol devices, all with one key: what a signature costs does not depend on whose it is."""
    stores = open_stores(state)
    names = [f"device-{number:05d}" for number in range(count)]
    with stores.storage.transaction() as connection:
        for name in names:
            device_rows.add(
                connection,
                f"d-{name}",
                name=name,
                device_class="load",
                public_key=key.public_key,
                enrolled_s=time.time(),
            )
    stores.storage.close()
    return [f"d-{name}" for name in names]


def signed_requests(ids: list[str], count: int, key: PrivateKey, host: str, salt: str) -> list[bytes]:
    """Whole requests, the devices in turn."""
    body = messages.encode(CheckInRequest("0.1.0", 1 << 30, 90 << 20, 1000, setup="0" * 32))
    found = []
    for number in range(count):
        headers = sign_request(
            key,
            device_id=ids[number % len(ids)],
            method="POST",
            path="/v1/check-in",
            body=body,
            now_s=int(time.time()),
            nonce=f"{salt}-{number:08d}",
        )
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(["POST /v1/check-in HTTP/1.1", f"Host: {host}", *lines])
        found.append(
            f"{head}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
    return found


async def send_all(host: str, port: int, requests: list[bytes], connections: int) -> list[float]:
    """Seconds that each request took, over connections with one request under way each."""
    waiting = iter(requests)
    took: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for request in waiting:
            begun_s = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(size)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode("latin-1"))
            took.append(time.perf_counter() - begun_s)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return took


def measure(load: Load, folder: Path) -> dict[str, float]:
    """Start a coordinator, warm it up by a check-in of each device, and measure."""
    publisher, key = generate_key(), generate_key()
    state = folder / "state"
    ids = enrol_all(state, load.devices, key)
    package = write_package(folder / "package", publisher)
    with coordinator(state) as process:
        admin = connect(state, None, None, None)
        admin.create_run(
            run_config(
                {
                    "name": "load",
                    "seed": 1,
                    "package": str(package),
                    "publisher_key": publisher.public_key,
                    "rounds": 1000,
                    "devices_per_round": 100,
                    "min_devices": 100,
                    "min_results": 100,
                    "steps": 1,
                    "batch_size": 1,
                }
            )
        )
        parts = urlsplit(admin.url)
        host, port = str(parts.hostname), int(parts.port or 0)
        warm = signed_requests(ids, load.devices, key, host, "warm")
        asyncio.run(send_all(host, port, warm, load.connections))
        requests = signed_requests(ids, load.requests, key, host, "load")
        before, begun_s = process.cpu_times(), time.perf_counter()
        took = asyncio.run(send_all(host, port, requests, load.connections))
        wall_s, after = time.perf_counter() - begun_s, process.cpu_times()
        cpu_s = after.user + after.system - before.user - before.system
        return {
            "CPU time of a check-in": cpu_s / load.requests,
            "check-ins per CPU second": load.requests / cpu_s,
            "check-ins per second": load.requests / wall_s,
            "99 in 100 answered within": quantiles(took, n=100)[98],
            "half answered within": quantiles(took, n=2)[0],
            "memory": float(process.memory_info().rss),
        }


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    load = Load(arguments.devices, arguments.requests, arguments.connections)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        found = measure(load, Path(folder))
    print(json.dumps(found, indent=2))
    if arguments.no_file:
        return
    figures = [
        figure(name, UNITS.get(name, "a second"), [value], REACH.get(name)) for name, value in found.items()
    ]
    write_result(
        RESULTS / "coordinator.json",
        "make bench-coordinator",
        1,
        figures,
        {
            "devices": load.devices,
            "check-ins": load.requests,
            "connections": load.connections,
            "loads at the end": list(os.getloadavg()),
        },
    )


if __name__ == "__main__":
    main()
