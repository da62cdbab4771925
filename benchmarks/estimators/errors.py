"""How far estimates are from exact gradients: after a step, a device's task and a round.

For estimates e and exact gradients g of the same parameters:

* error: Σ‖e - g‖² / Σ‖g‖², sums over steps or devices;
* cosine: e·g / ‖e‖‖g‖, mean over steps or devices;
* both of each slice by itself, and their mean over slices: what is left after every slice is divided by its exact
  gradient's norm, much as a server's Adam divides.

A step and a task are compared with the exact gradient of their own rows and slices; a round with the mean over all its
devices' rows, of all slices. So a round that deals slices out has an error even where its gradients are exact: each
slice meets few of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]
LEVELS = ("step", "task", "round")


@dataclass(frozen=True)
class Errors:
    """See the module; numbers without unit."""

    error: float
    cosine: float
    slice_error: float
    slice_cosine: float


def judge(
    estimates: DoubleArray, exact: DoubleArray, owned: DoubleArray, starts: Sequence[int]
) -> dict[str, Errors]:
    """Errors at each level.

    Args:
        estimates: (P, S, d) of devices and steps, zero where a device does not train.
        exact: (P, S, d) mean gradients of the same rows, of all slices.
        owned: (P, d), 1 where a device trains and 0 elsewhere; every entry is trained by some device.
        starts: where each slice starts among the d entries.
    """
    steps = exact.shape[1]
    of_task, own = estimates.mean(axis=1), exact * owned[:, None]
    averaged = of_task.sum(axis=0) / owned.sum(axis=0)
    return {
        "step": _errors(_rows(estimates), _rows(own), owned.repeat(steps, axis=0), starts),
        "task": _errors(of_task, own.mean(axis=1), owned, starts),
        "round": _errors(averaged[None], exact.mean(axis=(0, 1))[None], np.ones((1, exact.shape[2])), starts),
    }


def mean_errors(repeated: Sequence[Errors]) -> Errors:
    """Over repetitions."""
    names = ("error", "cosine", "slice_error", "slice_cosine")
    return Errors(**{name: float(np.mean([getattr(each, name) for each in repeated])) for name in names})


def per_example_error(gradients: DoubleArray, draws: int) -> float:
    """What the error of directions per example comes to, by edge_runtime.training.gradient's formula.

    Σ(d - 1)/(K·B)·mean_i‖g_i‖² / Σ‖ḡ‖²

    Args:
        gradients: (n, B, d) of n batches. draws: K.
    """
    batch, size = gradients.shape[1:]
    squares = (gradients**2).sum(axis=2).mean(axis=1)
    return float((size - 1) / (draws * batch) * squares.sum() / (gradients.mean(axis=1) ** 2).sum())


def passes(draws: int, way: str) -> int:
    """Forward passes of an example: ``forward`` mode 1 + K, ``central`` differences 2K."""
    return 2 * draws if way == "central" else 1 + draws


def draws_within(budget: int, way: str) -> int:
    """The most draws for so many forward passes, at least 1."""
    return max(budget // 2 if way == "central" else budget - 1, 1)


def _rows(array: DoubleArray) -> DoubleArray:
    return array.reshape(-1, array.shape[-1])


def _errors(estimate: DoubleArray, exact: DoubleArray, owned: DoubleArray, starts: Sequence[int]) -> Errors:
    """All arguments (n, d)."""
    trained = np.add.reduceat(owned, starts, axis=1) > 0
    products, sizes, squares, missed = (
        np.add.reduceat(each, starts, axis=1)
        for each in (estimate * exact, estimate**2, exact**2, (estimate - exact) ** 2)
    )
    scales = np.sqrt(sizes * squares)
    cosines = np.divide(products, scales, out=np.zeros_like(products), where=scales > 0)
    whole = products.sum(axis=1) / np.maximum(np.sqrt(sizes.sum(axis=1) * squares.sum(axis=1)), 1e-300)
    return Errors(
        error=float(missed.sum() / squares.sum()),
        cosine=float(whole.mean()),
        slice_error=float((missed.sum(axis=0) / squares.sum(axis=0)).mean()),
        slice_cosine=float(cosines[trained].mean()),
    )
