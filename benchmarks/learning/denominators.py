"""`make bench-denominators`: on which tasks slices could add to a head in closed form over all blocks.

    python -m benchmarks.learning.denominators --tasks injongo,clinc150 --rows 20

The head is solved from all rows of 100 devices; then slices are trained by exact gradients for 20 rounds, and the head
is solved again, in torch and float (:mod:`benchmarks.learning.torch_fleet`). In between, either the head is trained by
its gradient over the same features (``last``, the arm ``exact-top`` of :mod:`benchmarks.learning.one_visit`), or it
stays as the first visit solved it (``first_and_last``). Where exact gradients add little, no estimate can add more.
What was run before is kept in ``--output``, and in the result file rows of other tasks stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.result_file import EARLIER, RESULTS, Figure, earlier_rows, write_result
from benchmarks.learning.arms import ADAM
from benchmarks.learning.datasets import DEV_ROWS, TASKS, TaskData, prepare
from benchmarks.learning.one_visit import DENOMINATOR, TITLES, WIDE_HEAD
from benchmarks.learning.run import ROUNDS
from benchmarks.learning.torch_fleet import DEVICES, TorchFleet
from benchmarks.learning.torch_server import TorchServer
from coordinator.config import ServerOptimizerConfig

RESULT = "denominators.json"
SEED, ALPHA = 0, 1.0
#: When the head is solved, and what tables call it.
SCHEDULES = {"last": "head by its gradient", "first_and_last": "head of the first visit"}


def some_rows(task: str, data: Path, output: Path, rows: int) -> TaskData:
    """A task's files with so many training rows a device, and at most 1,000 dev rows, chosen by a permutation."""
    whole = prepare(task, data, output / "data" / task)
    folder = output / "data" / f"{task}-{rows}"
    folder.mkdir(parents=True, exist_ok=True)
    part = TaskData(folder / "train.jsonl", folder / "dev.jsonl", whole.labels)
    for source, target, count in (
        (whole.train, part.train, rows * DEVICES),
        (whole.dev, part.dev, DEV_ROWS),
    ):
        lines = source.read_text("utf-8").splitlines(keepends=True)
        order = np.random.Generator(np.random.Philox(SEED)).permutation(len(lines))[:count]
        target.write_text("".join(lines[place] for place in order), encoding="utf-8")
    return part


def measure(fleet: TorchFleet, schedule: str, rate: float) -> dict[str, float]:
    """Accuracy on dev rows, in percent: of the first visit's head, and of the second's after 20 rounds of slices."""
    head = ServerOptimizerConfig(**WIDE_HEAD) if schedule == "last" else None
    server = TorchServer(fleet, ServerOptimizerConfig(rate=rate, **ADAM), head)
    first = TorchServer(fleet, ServerOptimizerConfig(rate=rate, **ADAM), None)
    first.solve()
    if schedule == "first_and_last":
        server.weight, server.bias = first.weight, first.bias
    shares = fleet.shares(ALPHA, SEED)
    for number in range(ROUNDS):
        found = server.gradients(fleet.round_rows(shares, SEED, number))
        server.move(found.gradients.mean(axis=0), found, 1 - number / ROUNDS)
    server.solve()
    return {"visit": first.evaluate()[0], "slices": server.evaluate()[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the result file; returns a process exit code."""
    arguments = _arguments(argv)
    kept = arguments.output / "denominators.json"
    done: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    for task in arguments.tasks.split(","):
        asked = {
            f"{task} {arguments.rows} {schedule} {rate:g}": (schedule, rate)
            for schedule in arguments.schedules.split(",")
            for rate in map(float, arguments.rates.split(","))
        }
        if done.keys() >= asked.keys():
            continue
        files = some_rows(task, arguments.data, arguments.output, arguments.rows)
        fleet = TorchFleet(files, arguments.rows, every_block=True)
        for place, (schedule, rate) in asked.items():
            if place not in done:
                done[place] = measure(fleet, schedule, rate)
                kept.write_text(json.dumps(done), encoding="utf-8")
                print(place, done[place], flush=True)
    figures: list[Figure] = []
    titles = []
    for place, found in done.items():
        task, rows, schedule, rate_words = place.split()
        words = f"{TITLES[task]}, {rows} rows a device"
        titles.append(words)
        if not any(figure.name.startswith(words) for figure in figures):
            figures.append(_figure(f"{words}: one visit", found["visit"], "%"))
        added = found["slices"] - found["visit"]
        name = f"{words}: added by exact gradients on slices, {SCHEDULES[schedule]}, rate {rate_words}"
        figures.append(_figure(name, added, "points", DENOMINATOR))
    command = "python -m benchmarks.learning.denominators " + " ".join(argv or sys.argv[1:])
    others, commits = earlier_rows(RESULTS / RESULT, titles)
    conditions = {"seed": SEED, "Dirichlet": ALPHA, EARLIER: commits}
    write_result(RESULTS / RESULT, command, 1, [*others, *figures], conditions)
    return 0


def _figure(name: str, value: float, unit: str, reach: float | None = None) -> Figure:
    shown = round(value, 2)
    return Figure(name, shown, unit, reach, None if reach is None else shown >= reach, shown, shown)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.denominators", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=root / "build" / "learning", metavar="DIR")
    parser.add_argument("--tasks", default="trec_fine,clinc150,banking77,newsgroups,injongo,sib200")
    parser.add_argument("--rates", default="0.2,0.05", help="of the slices")
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="when the head is solved")
    parser.add_argument("--rows", type=int, default=20, help="training rows of a device")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.tasks.split(",")) - set(TASKS):
        parser.error(f"{min(unknown)!r} is none of {', '.join(TASKS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
