"""Check-ins a second of three coordinators on PostgreSQL beside one on SQLite, with two cores for all of it.

    python -m benchmarks.coordinator.several_processes --database postgresql://USER@HOST/NAME [--no-file]

The database must be empty, and its server runs on this machine as it was set up. Both take turns, so that whatever else
the machine does meets both; what sends the requests has its share of the two cores in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.coordinator.check_ins import BODY, send_all
from benchmarks.coordinator.site import ROOT, SMALL, Site
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from coordinator.storage.stores import Places

#: What is to be reached of one process on SQLite.
REACH_TIMES = 1.5


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        devices: number of enrolled devices, which take turns.
        requests: number of check-ins in a repetition.
        connections: number of connections that are kept open, each with one request under way.
        repetitions: how often each is measured, in turns.
        processes: number of coordinators on PostgreSQL.
    """

    devices: int = 1000
    requests: int = 2000
    connections: int = 48
    repetitions: int = 3
    processes: int = 3


def measure(folder: Path, database: str, load: Load) -> list[Figure]:
    """Start both, warm each up by a check-in of each device, and measure them in turns."""
    for kind in ("one", "several"):
        (folder / kind).mkdir()
    one = Site(folder / "one", SMALL, load.devices)
    several = Site(
        folder / "several", SMALL, load.devices, places=Places(database, secrets=folder / "secrets")
    )
    rates: dict[str, list[float]] = {"one": [], "several": []}
    costs: dict[str, list[float]] = {"one": [], "several": []}
    with _serving(one, 1) as first, _serving(several, load.processes) as rest:
        both = (("one", one, first), ("several", several, rest))
        for _, site, (ports, _) in both:
            site.port = ports[0]
            site.create_run(
                rounds=1000, devices_per_round=50, min_devices=50, min_results=50, poll_max_s=10.0
            )
            warm = [site.request(number, "POST", "/v1/check-in", BODY) for number in range(load.devices)]
            asyncio.run(send_all(warm, load.connections, ports))
        for _ in range(load.repetitions):
            for kind, site, (ports, processes) in both:
                requests = [
                    site.request(number % load.devices, "POST", "/v1/check-in", BODY)
                    for number in range(load.requests)
                ]
                before, begun_s = _cpu_s(processes), time.perf_counter()
                asyncio.run(send_all(requests, load.connections, ports))
                rates[kind].append(load.requests / (time.perf_counter() - begun_s))
                costs[kind].append((_cpu_s(processes) - before) / load.requests)
    ratios = [several / one for several, one in zip(rates["several"], rates["one"], strict=True)]
    return [
        Figure(
            "three processes on PostgreSQL over one on SQLite, check-ins a second",
            *(value := sorted(ratios)[len(ratios) // 2], "times", REACH_TIMES, value >= REACH_TIMES),
            *(min(ratios), max(ratios)),
        ),
        figure("one process on SQLite", "check-ins a second", rates["one"]),
        figure("three processes on PostgreSQL", "check-ins a second", rates["several"]),
        figure("CPU time of a check-in, one process on SQLite", "seconds", costs["one"]),
        figure("CPU time of a check-in, three processes without the database's", "seconds", costs["several"]),
    ]


@contextmanager
def _serving(site: Site, count: int) -> Iterator[tuple[list[int], list[psutil.Process]]]:
    """Ports of so many coordinators on a site's state, and their processes; the first has the site's state folder."""
    started = []
    states = [site.state, *(site.folder / f"state-{number}" for number in range(1, count))]
    for state in states:
        words = ["serve", "--state", str(state), "--port", "0"]
        if site.places is not None:
            words += ["--database", str(site.places.database), "--secrets", str(site.places.secrets)]
            (state / "blobs").parent.mkdir(exist_ok=True)
            if state != site.state:  # one folder of blobs for all, as a file server's would be
                (state / "blobs").symlink_to(site.state / "blobs")
                (state / "private").symlink_to(site.state / "private")
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "coordinator.cli", *words],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
            )
        )
    try:
        while not all((state / "url").exists() for state in states):
            time.sleep(0.05)
        ports = [int(urlsplit((state / "url").read_text().strip()).port or 0) for state in states]
        yield ports, [psutil.Process(process.pid) for process in started]
    finally:
        for process in started:
            process.terminate()
            process.wait()


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", required=True, help="URL of an empty database of PostgreSQL")
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.database, load)
    print(json.dumps({row.name: row.value for row in figures}, indent=2))
    if not arguments.no_file:
        conditions = {**asdict(load), "cores": 2, "loads at the end": list(os.getloadavg())}
        write_result(
            RESULTS / "coordinator-several-processes.json",
            "make bench-several-processes DATABASE=URL",
            load.repetitions,
            figures,
            conditions,
        )


if __name__ == "__main__":
    main()
