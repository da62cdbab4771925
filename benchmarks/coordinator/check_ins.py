"""Signed check-ins of a large fleet: how many a second of the coordinator's CPU, how long each takes, how much memory.

A run is open whose rounds ask for some of the fleet. All requests are signed before the clock starts, so that the
devices' own work is not in the figures. A second of CPU is the coordinator's own, whatever else the machine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from benchmarks.coordinator.site import SMALL, Site, send
from benchmarks.harness.result_file import Figure, figure
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest

BODY = messages.encode(CheckInRequest("0.1.0", 1 << 30, 90 << 20, 1000, setup="0" * 32))


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        devices: number of enrolled devices, which take turns.
        requests: number of check-ins.
        connections: number of connections that are kept open, each with one request under way.
    """

    devices: int = 10_000
    requests: int = 30_000
    connections: int = 64


def measure(folder: Path, load: Load) -> list[Figure]:
    """Start a coordinator, warm it up by a check-in of each device, and measure."""
    site = Site(folder, SMALL, load.devices)
    with site.serving() as process:
        site.create_run(rounds=1000, devices_per_round=100, min_devices=100, min_results=100, poll_max_s=10.0)
        warm_up = (_check_in(site, number) for number in range(load.devices))
        asyncio.run(send_all(warm_up, load.connections, [site.port]))
        requests = [_check_in(site, number) for number in range(load.requests)]
        before, begun_s = process.cpu_times(), time.perf_counter()
        took = asyncio.run(send_all(requests, load.connections, [site.port]))
        wall_s, after = time.perf_counter() - begun_s, process.cpu_times()
        memory_bytes = process.memory_info().rss
    cpu_s = after.user + after.system - before.user - before.system
    return [
        figure("CPU time of a check-in", "seconds", [cpu_s / load.requests], 1 / 1500),
        figure("check-ins per CPU second", "a second", [load.requests / cpu_s]),
        figure("check-ins per second", "a second", [load.requests / wall_s]),
        figure("99 in 100 answered within", "seconds", [quantiles(took, n=100)[98]], 0.1),
        figure("half answered within", "seconds", [quantiles(took, n=2)[0]]),
        figure("memory with this fleet", "bytes", [float(memory_bytes)]),
    ]


def _check_in(site: Site, number: int) -> bytes:
    return site.request(number % site.devices, "POST", "/v1/check-in", BODY)


async def send_all(requests: Iterable[bytes], connections: int, ports: Sequence[int]) -> list[float]:
    """Seconds that each request took, over connections with one request under way each, to these ports in turns."""
    waiting = iter(requests)
    took: list[float] = []

    async def one(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            begun_s = time.perf_counter()
            status, body = await send(reader, writer, request)
            if status != 200:
                raise RuntimeError(body.decode())
            took.append(time.perf_counter() - begun_s)
        writer.close()

    await asyncio.gather(*(one(ports[number % len(ports)]) for number in range(connections)))
    return took
