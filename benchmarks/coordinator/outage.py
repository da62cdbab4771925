"""A fleet that comes back at once after an outage: how it is spread, and whether anybody is turned away.

Devices have been told when to ask again. Then the coordinator is away for a while; each device tries when its time
comes, waits by the agent's own rule after every failure, and stops at its first answer.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import msgspec

from benchmarks.coordinator.check_ins import BODY
from benchmarks.coordinator.site import SMALL, Site, send
from benchmarks.harness.result_file import Figure, figure
from edge_runtime.agent.decisions import Pace


@dataclass(frozen=True)
class Load:
    """What happens.

    Attributes:
        devices: number of devices.
        away_s: seconds for which nobody answers.
    """

    devices: int = 5000
    away_s: float = 20.0


def measure(folder: Path, load: Load) -> list[Figure]:
    """Let all devices check in, take the coordinator away, bring it back, and watch them return."""
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection for each device
    site = Site(folder, SMALL, load.devices)
    with site.serving():
        site.create_run(
            rounds=1000, devices_per_round=100, min_devices=load.devices, min_results=100, poll_max_s=10.0
        )
        windows = asyncio.run(_check_in_all(site, load.devices))
    away_until_s = time.monotonic() + load.away_s
    found = asyncio.run(_return(site, windows, away_until_s))
    after = [arrived - found.back_s for arrived in found.answered_s]
    busiest = max(Counter(int(each) for each in after).values())
    return [
        figure("devices that came back", "devices", [float(len(after))]),
        figure("requests refused or cut off after the outage", "requests", [float(found.turned_away)], 0.0),
        figure("all back within", "seconds", [max(after)]),
        figure("most check-ins in a second of it", "a second", [float(busiest)]),
        figure("99 in 100 of them answered within", "seconds", [quantiles(found.took_s, n=100)[98]]),
    ]


@dataclass
class Returned:
    """How devices came back: when each was answered, how long that took, and how many were turned away."""

    back_s: float
    answered_s: list[float]
    took_s: list[float]
    turned_away: int = 0


async def _check_in_all(site: Site, devices: int) -> list[tuple[float, float]]:
    """The windows that devices were told."""
    waiting, windows = iter(range(devices)), [(0.0, 0.0)] * devices

    async def one() -> None:
        connection = await asyncio.open_connection("127.0.0.1", site.port)
        for device in waiting:
            _, body = await send(*connection, site.request(device, "POST", "/v1/check-in", BODY))
            answer = msgspec.json.decode(body)
            windows[device] = (answer["after_min_s"], answer["after_max_s"])
        connection[1].close()

    await asyncio.gather(*(one() for _ in range(32)))
    return windows


async def _return(site: Site, windows: list[tuple[float, float]], away_until_s: float) -> Returned:
    source = random.Random(5)  # noqa: S311 - no secrets
    returned = Returned(0.0, [], [])

    async def one(device: int) -> None:
        pace = Pace(random.Random(source.random()))  # noqa: S311 - no secrets
        await asyncio.sleep(pace.asked(*windows[device]))
        while True:
            begun_s = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
                status, _ = await send(reader, writer, site.request(device, "POST", "/v1/check-in", BODY))
                writer.close()
            except (OSError, asyncio.IncompleteReadError):
                status = 0
            if status == 200:
                returned.answered_s.append(time.monotonic())
                returned.took_s.append(time.monotonic() - begun_s)
                return
            if returned.back_s and begun_s > returned.back_s:
                returned.turned_away += 1
            await asyncio.sleep(pace.failed())

    devices = [asyncio.create_task(one(device)) for device in range(site.devices)]
    await asyncio.sleep(max(0.0, away_until_s - time.monotonic()))
    serving = site.serving()
    await asyncio.to_thread(serving.__enter__)
    returned.back_s = time.monotonic()
    try:
        await asyncio.gather(*devices)
    finally:
        await asyncio.to_thread(serving.__exit__, None, None, None)
    return returned
