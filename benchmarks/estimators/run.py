"""`make bench-estimators`: how near gradient estimates come to the exact gradient, at equal forward passes.

At points of a run of exact federated training on all-MiniLM-L6-v2, the exact gradient of each example is computed once
(:mod:`benchmarks.estimators.exact_gradients`). The estimators that the package offers
(:mod:`benchmarks.estimators.methods`), and some that it does not (:mod:`benchmarks.estimators.unshipped`), are then
judged on these gradients many times (:mod:`benchmarks.estimators.errors`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.estimators.errors import LEVELS, DoubleArray, Errors, draws_within, judge, mean_errors, passes
from benchmarks.estimators.exact_gradients import (
    ADAM,
    BATCH,
    HEAD_ADAM,
    SEED,
    SLICE_TYPES,
    SLOTS,
    STEPS,
    GradientSnapshot,
    snapshots,
)
from benchmarks.estimators.methods import SHIPPED, EstimatorMethod, StepInput, exact, make_task
from benchmarks.estimators.mixed_fleets import judge_mixed
from benchmarks.estimators.rows import BUDGETS, DEALT, MAIN_PASSES, MAIN_ROUND, signal, table_rows
from benchmarks.estimators.unshipped import BY_LABEL, by_label, unshipped_methods
from benchmarks.harness.arguments import command_line
from benchmarks.harness.measured_process import pinned_to_cores
from benchmarks.harness.result_file import RESULTS, write_result
from benchmarks.harness.tables import table
from coordinator.rounds.assignment import deal

RESULT = RESULTS / "estimators.json"
LAST_BLOCKS, QUERY_VALUE, LORA = SLICE_TYPES
#: Data set, slice type, and the numbers of rounds after which gradients are taken.
SETTINGS = (
    ("TREC", LAST_BLOCKS, (1, 5, 25)),
    ("SST-2", LAST_BLOCKS, (1, 5, 25)),
    ("TREC", QUERY_VALUE, (5,)),
    ("TREC", LORA, (5,)),
)
QUICK_SETTINGS = (("TREC", LAST_BLOCKS, (1,)),)
#: Methods that are judged where slices are dealt out to devices, too; the others would show the same.
DEALT_OUT = ("per_example", "one_slice", "dealt")
SPLITS: tuple[Literal["whole", "cyclic"], ...] = ("whole", "cyclic")


def main() -> int:
    """Judge every estimator and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-estimators"), help="for packages and points"
    )
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first so many of them")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 5, 25], help="only points after these")
    parser.add_argument("--quick", action="store_true", help="TREC after one round alone, 2 repetitions")
    parser.add_argument("--output", type=Path, help=f"default {RESULT.name} in results; none with --quick")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"no folder {arguments.data}; name the one that holds trec and sst2 with --data")
    pinned_to_cores(1)
    repetitions = 2 if arguments.quick else arguments.repetitions
    judged, signals, mixed = [], [], []
    settings = QUICK_SETTINGS if arguments.quick else SETTINGS
    for data_name, type_name, rounds in settings[: arguments.settings]:
        wanted = [number for number in rounds if number in arguments.rounds]
        if not wanted:
            continue
        for snapshot in snapshots(arguments.folder, arguments.data, data_name, type_name, wanted):
            where = {"data": data_name, "slices": type_name, "rounds": snapshot.round_number}
            signals.append({**where, **signal(snapshot)})
            print(json.dumps(signals[-1]), flush=True)
            judged += [{**where, **each} for each in judge_all(snapshot, repetitions)]
            mixed += [{**where, **each} for each in judge_mixed(snapshot, repetitions)]
    rows = table_rows(judged, signals, mixed)
    if arguments.quick and arguments.output is None:
        print("\n".join(f"{row.name}: {row.value} {row.unit}" for row in rows))
        return 0
    document = _write(
        arguments.output or RESULT, repetitions, rows, {"judged": judged, "signals": signals, "mixed": mixed}
    )
    print("\n" + table(document))
    return 0


def judge_all(snapshot: GradientSnapshot, repetitions: int) -> list[dict[str, Any]]:
    """Errors of every method at one point of the run, for each way to deal slices and each number of passes."""
    methods: dict[str, EstimatorMethod] = {**SHIPPED, **unshipped_methods(snapshot)}
    points = dict.fromkeys(methods, snapshot)
    methods[BY_LABEL], points[BY_LABEL] = SHIPPED["dealt"], by_label(snapshot)
    judged = []
    large = snapshot.gradients.shape[1] > 1000
    for split in SPLITS:
        found = judge_method(snapshot, EstimatorMethod(exact), 1, split, 1)
        judged.append(_entry("exact", split, 0, 0, found))
        for name, method in methods.items():
            if split == "cyclic" and name not in DEALT_OUT:
                continue
            widely = snapshot.round_number == MAIN_ROUND or name in DEALT
            budgets = BUDGETS if widely else (MAIN_PASSES,)
            for budget in budgets[:2] if large else budgets:
                draws = draws_within(budget, method.way)
                if draws < method.least_draws:
                    continue
                slow = name.startswith("filtered")
                found = judge_method(points[name], method, draws, split, 2 if slow or large else repetitions)
                judged.append(_entry(name, split, draws, passes(draws, method.way), found))
        print(f"  {split}: {len(judged)} judged", flush=True)
    return judged


def judge_method(
    snapshot: GradientSnapshot,
    method: EstimatorMethod,
    draws: int,
    split: Literal["whole", "cyclic"],
    repetitions: int,
) -> dict[str, Errors]:
    """Errors of one method at each level, means over repetitions that draw other directions."""
    specs = snapshot.specs
    sizes = [spec.dimensions for spec in specs]
    starts = [0, *np.cumsum(sizes)[:-1].tolist()]
    dealt = deal([spec.name for spec in specs], [], SLOTS, snapshot.round_number, split=split)
    size = snapshot.gradients.shape[1]
    by_step = snapshot.gradients.reshape(SLOTS, STEPS, BATCH, size)
    residuals = snapshot.residuals.reshape(SLOTS, STEPS, BATCH, -1)
    means = by_step.mean(axis=2, dtype=np.float64)
    repeated = []
    for repetition in range(repetitions):
        estimates: DoubleArray = np.zeros((SLOTS, STEPS, size))
        owned: DoubleArray = np.zeros((SLOTS, size))
        for slot, names in enumerate(dealt):
            own = tuple(spec for spec in specs if spec.name in names)
            columns = np.flatnonzero(np.repeat([spec.name in names for spec in specs], sizes))
            owned[slot, columns] = 1
            task = make_task(names, snapshot.round_number, slot, SEED + repetition, draws)
            for number in range(STEPS):
                gradients = np.ascontiguousarray(by_step[slot, number][:, columns])
                step = StepInput(
                    task, own, columns, number, gradients, residuals[slot, number], snapshot.last[columns]
                )
                estimates[slot, number, columns] = method.estimate(step)
        repeated.append(judge(estimates, means, owned, starts))
    return {level: mean_errors([each[level] for each in repeated]) for level in LEVELS}


def _entry(
    name: str, split: str, draws: int, passes_taken: int, found: Mapping[str, Errors]
) -> dict[str, Any]:
    """One entry of the result file, its numbers with four digits."""
    errors = {
        level: {key: float(f"{value:.4g}") for key, value in asdict(each).items()}
        for level, each in found.items()
    }
    return {"method": name, "split": split, "draws": draws, "passes": passes_taken, **errors}


def _write(path: Path, repetitions: int, rows: list[Any], more: dict[str, Any]) -> dict[str, Any]:
    command = command_line("benchmarks.estimators.run", "bench-estimators")
    conditions = {
        "model": "all-MiniLM-L6-v2, float",
        "data": "Dirichlet(1.0), 100 devices of 44 rows",
        "round": f"{SLOTS} devices, {STEPS} steps of {BATCH}",
        "run": f"exact gradients, Adam {ADAM.rate}, head {HEAD_ADAM.rate}",
        "seed": SEED,
        "repetitions": f"{repetitions}; of filtered and of LoRA 2",
    }
    document = {**write_result(path, command, 1, rows, conditions), **more}
    text = json.dumps(document, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return document


if __name__ == "__main__":
    sys.exit(main())
