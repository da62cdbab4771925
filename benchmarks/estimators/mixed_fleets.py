"""Fleets of which some devices have exact gradients and the others estimates: what each way to weigh them gives.

A round's mean over its ten devices is compared with the exact mean over the rows of all of them. Contributions count by
examples alone; by the variance that each states (:mod:`coordinator.rounds.stated_variance`); or those of the exact
devices alone, which throws the others' rows away. Which devices are exact is drawn anew in each repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from benchmarks.estimators.errors import DoubleArray, judge, mean_errors
from benchmarks.estimators.exact_gradients import BATCH, SEED, SLOTS, STEPS, GradientSnapshot
from benchmarks.estimators.methods import SHIPPED, StepInput, cut, make_task
from coordinator.aggregation.mean import Contribution, mean_delta
from coordinator.rounds.stated_variance import variance_factors

SHARES = (0.0, 0.2, 0.5, 0.8)
DRAWS = (4, 16)
Weighing = Callable[[list[Contribution], list[bool]], list[Contribution]]
WEIGHINGS: Mapping[str, Weighing] = {
    "stated variance": lambda given, exact: given,
    "examples": lambda given, exact: [replace(each, variance={}) for each in given],
    "exact devices alone": lambda given, exact: [
        each for each, is_exact in zip(given, exact, strict=True) if is_exact
    ],
}


def judge_mixed(snapshot: GradientSnapshot, repetitions: int) -> list[dict[str, Any]]:
    """Errors after a round, for each share of exact devices, number of draws, and way to weigh."""
    size = snapshot.gradients.shape[1]
    by_step = snapshot.gradients.reshape(SLOTS, STEPS, BATCH, size)
    exact = by_step.mean(axis=(1, 2), dtype=np.float64)
    starts = [0, *np.cumsum([spec.dimensions for spec in snapshot.specs])[:-1].tolist()]
    judged = []
    for draws in DRAWS:
        estimated = [_estimates(snapshot, by_step, draws, SEED + each) for each in range(repetitions)]
        for share in SHARES:
            for name, weighing in WEIGHINGS.items():
                if share == 0.0 and name == "exact devices alone":
                    continue
                errors = []
                for repetition, each in enumerate(estimated):
                    order = np.random.default_rng(repetition).permutation(SLOTS)
                    is_exact = [bool(place < round(share * SLOTS)) for place in order]
                    mean = _mean(snapshot, exact, each, draws, is_exact, weighing)
                    everything = np.ones((1, size))
                    errors.append(
                        judge(mean[None, None], exact.mean(axis=0)[None, None], everything, starts)["round"]
                    )
                found = mean_errors(errors)
                judged.append(
                    {
                        "share": share,
                        "draws": draws,
                        "weights": name,
                        "error": float(f"{found.error:.4g}"),
                        "slice_error": float(f"{found.slice_error:.4g}"),
                    }
                )
    return judged


def _estimates(snapshot: GradientSnapshot, by_step: Any, draws: int, seed: int) -> DoubleArray:
    """Each device's mean estimate over its steps, (P, d), along dealt directions."""
    columns = np.arange(snapshot.gradients.shape[1])
    names = tuple(spec.name for spec in snapshot.specs)
    made: DoubleArray = np.zeros((SLOTS, len(columns)))
    for slot in range(SLOTS):
        task = make_task(names, snapshot.round_number, slot, seed, draws)
        for number in range(STEPS):
            gradients = np.ascontiguousarray(by_step[slot, number])
            step = StepInput(
                task, snapshot.specs, columns, number, gradients, snapshot.residuals, snapshot.last
            )
            made[slot] += SHIPPED["dealt"].estimate(step) / STEPS
    return made


def _mean(
    snapshot: GradientSnapshot,
    exact: DoubleArray,
    estimated: DoubleArray,
    draws: int,
    is_exact: list[bool],
    weighing: Weighing,
) -> DoubleArray:
    """The server's mean (d,) of a round's contributions."""
    names = tuple(spec.name for spec in snapshot.specs)
    task = msgspec.structs.replace(make_task(names, 0, 0, 0, draws), directions="dealt")
    factors = variance_factors(task, snapshot.specs, "forward", draws)
    given = []
    for slot in range(SLOTS):
        flat = exact[slot] if is_exact[slot] else estimated[slot]
        delta = cut(flat, snapshot.specs)
        given.append(
            Contribution(STEPS * BATCH, delta, slot=slot, variance={} if is_exact[slot] else factors)
        )
    means = mean_delta(weighing(given, is_exact))
    return np.concatenate([means[name].ravel() for name in cut(exact[0], snapshot.specs)])
