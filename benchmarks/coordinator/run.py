"""All figures of the coordinator under load.

    python -m benchmarks.coordinator.run [--stages check_ins,full_rounds,outage,dashboard,downloads] [--no-file]

A stage that is not run keeps the rows that the result file has of it. The coordinator runs on one core, what sends
requests on another.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.coordinator import check_ins, dashboard, downloads, full_rounds, outage
from benchmarks.coordinator.site import LOAD_CORE
from benchmarks.harness.result_file import RESULTS, Figure, write_result


def _full_rounds(folder: Path) -> list[Figure]:
    load = full_rounds.Load()
    return full_rounds.figures(full_rounds.measure(folder, load), load)


STAGES: dict[str, tuple[Callable[[Path], list[Figure]], dict[str, object]]] = {
    "check_ins": (lambda folder: check_ins.measure(folder, check_ins.Load()), asdict(check_ins.Load())),
    "full_rounds": (_full_rounds, asdict(full_rounds.Load())),
    "outage": (lambda folder: outage.measure(folder, outage.Load()), asdict(outage.Load())),
    "dashboard": (lambda folder: dashboard.measure(folder, dashboard.Load()), asdict(dashboard.Load())),
    "downloads": (lambda folder: downloads.measure(folder, downloads.Load()), asdict(downloads.Load())),
}


def main() -> None:
    """Measure, print, and write a result file for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    for name in arguments.stages.split(","):
        measure, load = STAGES[name]
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder))
        print(name, json.dumps({row.name: row.value for row in figures}, indent=2), flush=True)
        if not arguments.no_file:
            command = f"make bench-coordinator STAGES={name}"
            conditions = {**load, "loads at the end": list(os.getloadavg())}
            write_result(
                RESULTS / f"coordinator-{name.replace('_', '-')}.json", command, 1, figures, conditions
            )


if __name__ == "__main__":
    main()
