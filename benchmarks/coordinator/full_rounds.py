"""Rounds of many devices with results of 100 kB: how many results a second, and how much memory the coordinator takes.

Each simulated device checks in, fetches the current values (100 kB) and hands in a result (100 kB); all of one round
over so many connections. No two changes are alike. What is measured begins with the first check-in and ends with the
round's commit.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil

from benchmarks.coordinator.check_ins import BODY
from benchmarks.coordinator.site import LARGE, Site, peak_bytes, send
from benchmarks.harness.result_file import Figure, figure
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.protocol.messages import MemoryReport, Result, SignedTask, Task, encode_result

#: The round from which on memory must not grow, and by how much it may until the last one.
SETTLED_ROUND, GROWTH_BYTES = 10, 5_000_000


@dataclass(frozen=True)
class Load:
    """What is done.

    Attributes:
        devices: number of devices of a round.
        rounds: number of rounds.
        connections: number of connections.
    """

    devices: int = 1000
    rounds: int = 12
    connections: int = 32


@dataclass(frozen=True)
class Found:
    """What rounds took.

    Attributes:
        round_s: seconds of each round.
        round_cpu_s: seconds of the coordinator's CPU of each round.
        memory_bytes: memory after each round.
        peak_bytes: the most that it ever held.
    """

    round_s: list[float]
    round_cpu_s: list[float]
    memory_bytes: list[int]
    peak_bytes: int


def measure(folder: Path, load: Load) -> Found:
    """Play the rounds."""
    site = Site(folder, LARGE, load.devices)
    everybody = {"devices_per_round": load.devices, "min_devices": load.devices, "min_results": load.devices}
    with site.serving() as process:
        run_id = site.create_run(
            **everybody, rounds=load.rounds, split="whole", deadline_s=3600.0, selection_timeout_s=3600.0
        )
        return asyncio.run(_play(site, process, run_id, load))


def figures(found: Found, load: Load) -> list[Figure]:
    """What is told of them."""
    per_round = [load.devices / seconds for seconds in found.round_s[1:]]
    rows = [
        figure("results of 100 kB per second", "a second", per_round),
        figure("CPU time of a result", "seconds", [each / load.devices for each in found.round_cpu_s[1:]]),
        figure("peak memory over the rounds", "bytes", [float(found.peak_bytes)]),
    ]
    if load.rounds > SETTLED_ROUND:
        settled = found.memory_bytes[SETTLED_ROUND - 1]
        growth = float(max(0, found.memory_bytes[-1] - settled))
        rows.append(figure("growth after round 10", "bytes", [growth], GROWTH_BYTES))
    return rows


async def _play(site: Site, process: psutil.Process, run_id: str, load: Load) -> Found:
    generator = np.random.default_rng(1)
    change = encode_values(
        {
            name: generator.standard_normal(shape).astype(np.float32)
            for name, shape in shapes(site.specs).items()
        }
    )
    first = await asyncio.open_connection("127.0.0.1", site.port)
    for device in range(load.devices):  # a round opens once all of them are there
        await send(*first, site.request(device, "POST", "/v1/check-in", BODY))
    first[1].close()
    connections = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(load.connections)]
    round_s, round_cpu_s, memory = [], [], []
    for number in range(load.rounds):
        waiting = iter(range(load.devices))
        cpu, begun_s = process.cpu_times(), time.perf_counter()
        await asyncio.gather(*(_work(site, each, waiting, change) for each in connections))
        while (await asyncio.to_thread(site.admin.run, run_id)).rounds_committed <= number:
            await asyncio.sleep(0.05)
        after = process.cpu_times()
        round_s.append(time.perf_counter() - begun_s)
        round_cpu_s.append(after.user + after.system - cpu.user - cpu.system)
        memory.append(process.memory_info().rss)
    return Found(round_s, round_cpu_s, memory, peak_bytes(process))


async def _work(
    site: Site,
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    waiting: object,
    change: bytes,
) -> None:
    """Devices, one after the other: each asks until it has its task, fetches, and hands in."""
    for device in waiting:  # type: ignore[attr-defined]
        while True:
            status, body = await send(*connection, site.request(device, "POST", "/v1/check-in", BODY))
            if status != 200:
                raise RuntimeError(body.decode())
            answer = msgspec.json.decode(body)
            if answer["answer"] == "task":
                break
            await asyncio.sleep(0.02)
        task = msgspec.json.decode(msgspec.json.decode(body, type=SignedTask).task, type=Task)
        status, values = await send(*connection, site.request(device, "GET", f"/v1/blobs/{task.state}"))
        if status != 200 or hashlib.sha256(values).hexdigest() != task.state:
            raise RuntimeError(f"no values: {status}")
        own = change[:-4] + np.float32(1 + device / 1000).tobytes()
        result = Result(
            task_id=task.task_id,
            run_id=task.run_id,
            round=task.round,
            examples=4,
            steps_applied=1,
            steps_skipped=0,
            mean_loss=0.5,
            seconds=1.0,
            memory=MemoryReport(1, 1, 1),
            change_sha256=hashlib.sha256(own).hexdigest(),
            change=own,
        )
        path = f"/v1/tasks/{task.task_id}/result"
        status, body = await send(*connection, site.request(device, "PUT", path, encode_result(result)))
        if status != 200:
            raise RuntimeError(body.decode())
