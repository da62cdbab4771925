"""Which of the bench's many figures the decision page shows, and what the gradients themselves are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.estimators.errors import per_example_error
from benchmarks.estimators.exact_gradients import BATCH, SLOTS, GradientSnapshot
from benchmarks.estimators.unshipped import BY_LABEL, residual_maps, softened
from benchmarks.harness.result_file import Figure, figure

#: Forward passes of an example: those of forward mode with 1, 4 and 16 draws.
BUDGETS = (2, 5, 17)
#: The budget that is tried at every point of the run; all budgets are tried at one point only.
MAIN_PASSES, MAIN_ROUND = BUDGETS[1], 5
MAIN_SLICES = "LoRA-XS, last 2 blocks"
BASE = "per_example"
SPLIT_WORDS = {"whole": "all slices to every device", "cyclic": "slices dealt out"}
#: Methods that spread the noise over slices in another way than the rest.
PER_SLICE = ("one_slice", "dealt", "coordinate scales", "eigenvector scales")
#: Ways to deal directions, compared at every budget and point with independent ones, the first of them.
DEALT = ("one_slice", "dealt", "dealt by each device", "dealt, all slices a draw", BY_LABEL)


def signal(snapshot: GradientSnapshot) -> dict[str, Any]:
    """What decides how well gradients can be estimated, in numbers without unit.

    * ``noise``: E‖g_i‖² / ‖ḡ‖² over the round's rows;
    * ``noise_unbiased``: the same without the part of ‖ḡ‖² that comes from the scatter of the rows themselves; None
      where nothing is left;
    * ``*_unexplained``: the part of E‖g_i‖² that a control variate leaves;
    * ``*_gain``: how many times smaller the error is with scales that fit the very rows they are judged on;
    * ``device_spread``: variance of the devices' own mean gradients over that of a mean of one device's rows;
    * ``slice_shares``: each slice's share of E‖g_i‖²;
    * ``last_cosine``: cosine of ḡ to the exact mean gradient of the round before;
    * ``step_error_of_one_draw``: error after a step of directions per example with one draw, by formula.
    """
    gradients = snapshot.gradients.astype(np.float64)
    count, size = gradients.shape
    moments = (gradients**2).mean(axis=0)
    total, mean = float(moments.sum()), float((gradients.mean(axis=0) ** 2).sum())
    unbiased = (mean - total / count) / (1 - 1 / count)
    left_residual = gradients - snapshot.residuals @ residual_maps(snapshot)
    starts = np.cumsum([0, *(spec.dimensions for spec in snapshot.specs[:-1])])
    shares = np.add.reduceat(moments, starts) / total
    found: dict[str, Any] = {
        "loss": snapshot.loss,
        "dimensions": size,
        "noise": total / mean,
        "noise_unbiased": total / unbiased if unbiased > 0 else None,
        "last_cosine": cosine(snapshot.last, gradients.mean(axis=0)),
        "mean_unexplained": float(((gradients - snapshot.last) ** 2).sum(axis=1).mean() / total),
        "residual_unexplained": float((left_residual**2).sum(axis=1).mean() / total),
        "coordinate_gain": float(size * total / np.sqrt(moments).sum() ** 2),
        "device_spread": device_spread(gradients),
        "jvp_difference": snapshot.jvp_difference,
        "step_error_of_one_draw": per_example_error(gradients.reshape(-1, BATCH, size), 1),
    }
    if size <= 1000:
        values = softened(np.linalg.eigvalsh(gradients.T @ gradients / count))
        found["eigenvector_gain"] = float(size * values.sum() / np.sqrt(values).sum() ** 2)
    rounded = {key: value if value is None else float(f"{value:.4g}") for key, value in found.items()}
    shown = {spec.target: float(f"{share:.3g}") for spec, share in zip(snapshot.specs, shares, strict=True)}
    return {**rounded, "slice_shares": shown}


def device_spread(gradients: NDArray[np.float64]) -> float:
    """How much devices differ beside how much rows do, from gradients (SLOTS·n, d) of n rows a device.

    The variance of the means of devices is that of the devices' own means and, over n, that of a device's rows.
    """
    by_device = gradients.reshape(SLOTS, -1, gradients.shape[1])
    means = by_device.mean(axis=1)
    rows = by_device.var(axis=1, ddof=1).sum(axis=1).mean() / by_device.shape[1]
    return float(means.var(axis=0, ddof=1).sum() / rows - 1)


def table_rows(
    judged: Sequence[Mapping[str, Any]],
    signals: Sequence[Mapping[str, Any]],
    mixed: Sequence[Mapping[str, Any]],
) -> list[Figure]:
    """The page's rows: medians and ranges over data sets and points of the run, for LoRA-XS in the last two blocks."""
    points = [each for each in signals if each["slices"] == MAIN_SLICES]
    kept = [each for each in judged if each["slices"] == MAIN_SLICES]
    rows = [*_signal_rows(points), *_absolute_rows(kept)]
    measured = _found(kept, BASE, "whole", "step", "error")
    by_formula = [each["step_error_of_one_draw"] / (MAIN_PASSES - 1) for each in points]
    over = [a / b for a, b in zip(measured, by_formula, strict=True)]
    rows.append(figure(f"{BASE}: error after a step, over the formula's", "times", over))
    names = list(dict.fromkeys(each["method"] for each in kept))
    for name in names:
        if name not in {"exact", "filtered (biased)", BASE}:
            rows.append(_ratio(kept, name, "round", "error"))
    for name in names:
        if name in PER_SLICE:
            rows.append(_ratio(kept, name, "round", "slice_error"))
    return [
        *rows,
        *_dealt_rows(kept),
        *_mixed_rows([each for each in mixed if each["slices"] == MAIN_SLICES]),
    ]


def _dealt_rows(kept: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """What dealing gains on the same slices and draws, point by point."""
    rows = []
    for name, budget, key in product(DEALT[1:], BUDGETS, ("error", "slice_error")):
        if key == "slice_error" and name != "dealt":
            continue
        own, base = (_found(kept, each, "whole", "round", key, passes=budget) for each in (name, DEALT[0]))
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        words = "error" if key == "error" else "mean error of slices"
        figure_name = f"{name}, {budget} passes: {words} after a round, over {DEALT[0]}'s"
        rows.append(figure(figure_name, "times", ratios))
    return rows


def _mixed_rows(mixed: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """A round's mean over a mixed fleet, by share of exact devices, draws of the others and weights."""
    rows = []
    for share, draws, weights in dict.fromkeys((m["share"], m["draws"], m["weights"]) for m in mixed):
        if share == 0 and weights != "examples":
            continue  # all alike
        errors = [
            each["error"]
            for each in mixed
            if (each["share"], each["draws"], each["weights"]) == (share, draws, weights)
        ]
        words = f"{share:.0%} exact, {draws} draws".replace("%", " %")
        rows.append(figure(f"{words}, weights by {weights}: error after a round", "", errors))
    return rows


def _signal_rows(points: Sequence[Mapping[str, Any]]) -> list[Figure]:
    rows = [
        figure(f"{data}, after {each['rounds']} rounds: E‖g_i‖² / ‖ḡ‖²", "", [each["noise"]])
        for data in dict.fromkeys(each["data"] for each in points)
        for each in points
        if each["data"] == data
    ]
    shares = [each["slice_shares"].values() for each in points]
    return [
        *rows,
        figure("smallest slice's share of E‖g_i‖²", "", [min(each) for each in shares]),
        figure("largest slice's share of E‖g_i‖²", "", [max(each) for each in shares]),
        figure(
            "E‖g_i - m‖² / E‖g_i‖², m of the round before", "", [each["mean_unexplained"] for each in points]
        ),
        figure(
            "the same with residuals times J for m", "", [each["residual_unexplained"] for each in points]
        ),
        figure(
            "variance between devices over that of their rows' means",
            "",
            [each["device_spread"] for each in points],
        ),
        figure("ḡ: cosine to that of the round before", "", [each["last_cosine"] for each in points]),
    ]


def _absolute_rows(kept: Sequence[Mapping[str, Any]]) -> list[Figure]:
    rows = [
        figure(f"{BASE}, {each} passes: error after a step, round {MAIN_ROUND}", "", values)
        for each in BUDGETS
        if (values := _found(kept, BASE, "whole", "step", "error", passes=each, rounds=MAIN_ROUND))
    ]
    wanted = [
        (BASE, "whole", "step", "cosine"),
        (BASE, "whole", "round", "cosine"),
        (BASE, "whole", "round", "slice_cosine"),
        ("one_slice", "whole", "round", "slice_cosine"),
        ("filtered (biased)", "whole", "round", "cosine"),
        (BASE, "whole", "round", "error"),
        (BASE, "cyclic", "round", "error"),
        ("exact", "cyclic", "round", "error"),
    ]
    for name, split, level, key in wanted:
        values = _found(kept, name, split, level, key)
        words = {"slice_cosine": "mean cosine of slices"}.get(key, key)
        rows.append(figure(f"{name}, {SPLIT_WORDS[split]}: {words} after a {level}", "", values))
    return rows


def _found(
    kept: Sequence[Mapping[str, Any]], name: str, split: str, level: str, key: str, **where: float
) -> list[float]:
    """One figure of a method at every point, by default at 5 passes; the exact gradient has no number of passes."""
    where = where if "passes" in where or name == "exact" else {**where, "passes": MAIN_PASSES}
    return [
        each[level][key]
        for each in kept
        if each["method"] == name and each["split"] == split and all(each[k] == v for k, v in where.items())
    ]


def _ratio(kept: Sequence[Mapping[str, Any]], name: str, level: str, key: str) -> Figure:
    """A method's error over that of directions per example, point by point; neither takes more than 5 passes."""
    own = [
        each[level][key]
        for each in kept
        if each["method"] == name
        and each["split"] == "whole"
        and MAIN_PASSES - 1 <= each["passes"] <= MAIN_PASSES
    ]
    base = _found(kept, BASE, "whole", level, key)
    words = "error" if key == "error" else "mean error of slices"
    return figure(
        f"{name}: {words} after a {level}, over {BASE}'s",
        "times",
        [a / b for a, b in zip(own, base, strict=True)],
    )


def cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float:
    """The cosine of two vectors; 0 where one of them is zero."""
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else 0.0
