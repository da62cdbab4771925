"""`make bench-schedules`: what draws are worth early and late in a run, from the errors of `make bench-estimators`.

    python -m benchmarks.estimators.draw_schedules

A round t of T whose rates are a share s_t of the first, and which takes K_t draws, moves the values by noise of
s_t² n_t / K_t, with n_t the error of one draw relative to the gradient: K times the error of ``dealt`` directions
after a round, on a log-log line through the points of the run that were measured. A schedule is judged by the sum over
rounds, at equal draws in all. The best one there can be, K_t ∝ s_t √n_t, knows n_t beforehand: no rule that measures it
can do better.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.result_file import RESULTS, Figure, write_result

RESULT, SOURCE = "draw-schedules.json", "estimators.json"
ROUNDS, DRAWS, PASSES, METHOD = 20, 8, 5, "dealt"
DoubleArray = NDArray[np.float64]


def noise_of_a_draw() -> DoubleArray:
    """Error of one draw after each of the rounds 1 to T."""
    judged = json.loads((RESULTS / SOURCE).read_text("utf-8"))["judged"]
    points = {
        each["rounds"]: each["draws"] * each["round"]["error"]
        for each in judged
        if (each["method"], each["split"], each["passes"]) == (METHOD, "whole", PASSES)
    }
    rounds = np.arange(1, ROUNDS + 1)
    found: DoubleArray = np.exp(
        np.interp(np.log(rounds), np.log(list(points)), np.log(list(points.values())))
    )
    return found


def schedules(weights: DoubleArray) -> dict[str, DoubleArray]:
    """Draws of each round, equal in all; ``weights`` is each round's noise at one draw."""
    first = np.arange(ROUNDS) < ROUNDS / 2
    given = {
        "4 draws, then 12": np.where(first, 4.0, 12.0),
        "12 draws, then 4": np.where(first, 12.0, 4.0),
        "the best there is": np.sqrt(weights),
    }
    return {name: draws * (ROUNDS * DRAWS / draws.sum()) for name, draws in given.items()}


def main() -> int:
    """Write the result file; returns a process exit code."""
    rows = []
    noise = noise_of_a_draw()
    for words, shares in (
        ("rates that fall to zero", 1 - np.arange(ROUNDS) / ROUNDS),
        ("rates that stay", np.ones(ROUNDS)),
    ):
        weights = shares**2 * noise
        for name, draws in schedules(weights).items():
            ratio = round(float((weights / draws).sum() / (weights / DRAWS).sum()), 2)
            rows.append(
                Figure(
                    f"{words}, {name}: noise over that of 8 draws", ratio, "times", None, None, ratio, ratio
                )
            )
    write_result(
        RESULTS / RESULT, "python -m benchmarks.estimators.draw_schedules", 1, rows, {"from": SOURCE}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
