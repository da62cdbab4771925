"""A package to many clients at once, over lines that break off: does every byte arrive, and in how much memory.

Each client fetches one file of the package. At random places it drops the connection, and goes on with ``Range`` and
``If-Range`` from what it has, as the agent does; at the end it compares the sha256.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.coordinator.site import SMALL, Site
from benchmarks.harness.result_file import Figure, figure

#: What the coordinator may take above what it took before.
FLAT_BYTES = 32_000_000


@dataclass(frozen=True)
class Load:
    """What is fetched.

    Attributes:
        clients: number of clients at once.
        file_bytes: size of the file that each fetches.
        cuts: number of times that each drops its connection, on the average.
    """

    clients: int = 200
    file_bytes: int = 10_000_000
    cuts: float = 2.0


def measure(folder: Path, load: Load) -> list[Figure]:
    """Let all clients fetch the file."""
    data = random.Random(2).randbytes(load.file_bytes)  # noqa: S311 - no secrets
    sha256 = hashlib.sha256(data).hexdigest()
    site = Site(folder, SMALL, load.clients, {"weights.bin": data})
    with site.serving() as process:
        site.create_run()
        before = process.memory_info().rss
        begun_s, cpu = time.perf_counter(), process.cpu_times()
        peak, right, cuts = asyncio.run(_fetch_all(site, process.memory_info, sha256, load))
        seconds, after = time.perf_counter() - begun_s, process.cpu_times()
    total = load.clients * load.file_bytes
    cpu_s = after.user + after.system - cpu.user - cpu.system
    return [
        figure("bytes fetched", "bytes", [float(total)]),
        figure("clients with other bytes", "clients", [float(load.clients - right)], 0.0),
        figure("connections dropped and resumed", "times", [float(cuts)]),
        figure("bytes per second", "bytes", [total / seconds]),
        figure("CPU time of a gigabyte", "seconds", [cpu_s / total * 1e9]),
        figure("memory that it took on top", "bytes", [float(max(0, peak - before))], FLAT_BYTES),
    ]


async def _fetch_all(site: Site, memory: object, sha256: str, load: Load) -> tuple[int, int, int]:
    """The most memory at any moment, how many clients got the right bytes, and how often connections were dropped."""
    peak, cuts = 0, 0
    source = random.Random(3)  # noqa: S311 - no secrets

    async def one(client: int) -> bool:
        nonlocal cuts
        digest, have = hashlib.sha256(), 0
        while have < load.file_bytes:
            wanted = load.file_bytes - have
            until = min(wanted, int(source.expovariate(load.cuts / load.file_bytes)) + 1)
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            headers = {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'} if have else {}
            writer.write(site.request(client, "GET", f"/v1/blobs/{sha256}", **headers))
            head = await reader.readuntil(b"\r\n\r\n")
            if head[9:12] != (b"206" if have else b"200"):
                raise RuntimeError(head.decode("latin-1"))
            got = 0
            while got < until:
                chunk = await reader.read(min(1 << 16, until - got))
                if not chunk:
                    break
                digest.update(chunk)
                got += len(chunk)
            have += got
            cuts += have < load.file_bytes
            writer.transport.abort()
        return digest.hexdigest() == sha256

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, memory().rss)  # type: ignore[operator]
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    right = sum(await asyncio.gather(*(one(client) for client in range(load.clients))))
    watching.cancel()
    return peak, right, cuts
