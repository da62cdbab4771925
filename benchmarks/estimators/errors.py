"""How far estimates are from exact gradients: after a step, a device's task and a round.

For estimates e and exact gradients g of the same parameters:

* error: Σ‖e - g‖² / Σ‖g‖², sums over steps or devices;
* cosine: e·g / ‖e‖‖g‖, mean over steps or devices;
* error and cosine of each slice by itself, then their means over slices. Here every slice counts alike, much as a
  server's Adam divides every slice by its own size.

A step and a task are compared with the exact gradient of their own rows and slices. A round is compared with the mean
over the rows of all its devices, for all slices. So a round that deals slices out has an error even where its gradients
are exact: each slice meets few of the rows.
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
    """Distance of estimates from exact gradients, in numbers without unit; the module says how each is defined.

    Attributes:
        error: squared error over the squared norm of the exact gradients.
        cosine: mean cosine of estimate and exact gradient.
        slice_error: mean over slices of each slice's own error.
        slice_cosine: mean over slices of each slice's own cosine.
    """

    error: float
    cosine: float
    slice_error: float
    slice_cosine: float


def judge(
    estimates: DoubleArray, exact: DoubleArray, owned: DoubleArray, starts: Sequence[int]
) -> dict[str, Errors]:
    """Errors at each level.

    Args:
        estimates: estimates (P, S, d) of P devices in S steps, zero where a device does not train.
        exact: mean gradients (P, S, d) of the same rows, for all slices.
        owned: ones where a device trains and zeros elsewhere, (P, d); every entry is trained by some device.
        starts: index of each slice's first entry among the d.

    Returns:
        The errors after a ``step``, a ``task`` and a ``round``.
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
    """The mean over repetitions."""
    names = ("error", "cosine", "slice_error", "slice_cosine")
    return Errors(**{name: float(np.mean([getattr(each, name) for each in repeated])) for name in names})


def per_example_error(gradients: DoubleArray, draws: int) -> float:
    """The error that directions per example should have, by the formula in ``edge_runtime.training.gradient``.

    It is Σ (d - 1)/(K·B)·mean_i‖g_i‖² / Σ‖ḡ‖², both sums over batches.

    Args:
        gradients: gradients (n, B, d) of the B examples of n batches.
        draws: number of draws K.
    """
    batch, size = gradients.shape[1:]
    squares = (gradients**2).sum(axis=2).mean(axis=1)
    return float((size - 1) / (draws * batch) * squares.sum() / (gradients.mean(axis=1) ** 2).sum())


def passes(draws: int, way: str) -> int:
    """Forward passes of an example with K draws: 1 + K in ``forward`` mode, 2K by ``central`` differences."""
    return 2 * draws if way == "central" else 1 + draws


def draws_within(budget: int, way: str) -> int:
    """The most draws that so many forward passes allow, at least 1."""
    return max(budget // 2 if way == "central" else budget - 1, 1)


def _rows(array: DoubleArray) -> DoubleArray:
    return array.reshape(-1, array.shape[-1])


def _errors(estimate: DoubleArray, exact: DoubleArray, owned: DoubleArray, starts: Sequence[int]) -> Errors:
    """The errors of n estimates.

    Args:
        estimate: estimates, (n, d).
        exact: exact gradients, (n, d).
        owned: ones where an estimate is made and zeros elsewhere, (n, d).
        starts: index of each slice's first entry among the d.
    """
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
