"""Estimators that the package does not have, judged beside those that it has.

Some have to know things beforehand: the mean gradient, the directions of large gradients, or how gradients follow from
residuals. They get these from exact gradients of other devices' rows at the very same values. A fleet could not know as
much, so their figures here are the best they could reach. v stands for the runtime's directions per example, whose
entries are ±1.

* ``mean control``: m + mean (g_i·v - m·v) v, with m the mean gradient of the round before;
* ``residual control``: the same with h_i = Σ_c r_ic J_c in place of m, where r_i is the softmax residual and J is
  fitted by ridge regression;
* ``coordinate scales``: mean (g_i·D^-½ v) D^½ v with D_j ∝ √E g_j²: of all diagonal D the least error,
  (Σ_j √E g_j²)² instead of d Σ_j E g_j²;
* ``eigenvector scales``: the same in the eigenvectors of E g gᵀ;
* ``momentum direction``: the first draw is m/‖m‖, the others are orthogonal to it and cover the rest;
* ``orthogonal over steps``: directions shared by the batch, rows of one Hadamard matrix over all of a task's draws and
  steps;
* ``orthogonal over examples``: the same over its draws, steps and examples, so that each example has its own;
* ``dealt, all slices a draw``: dealt directions as if all slices were one, so that each draw moves them all;
* ``dealt by each device``: dealt directions whose decks each device begins anew, instead of going on from those of the
  device before it;
* ``dealt, rows by label``: dealt directions on a task's rows in the order of their labels, so that those which share a
  deck agree more; only where all of a task's gradients are taken at the same values;
* ``clamped`` (biased): jvps beyond their 99 % quantile are cut to it, as a task's ``jvp_limit`` does with a fixed
  limit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import msgspec
import numpy as np

from benchmarks.estimators.errors import DoubleArray
from benchmarks.estimators.exact_gradients import BATCH, SLOTS, STEPS, GradientSnapshot, Matrix
from benchmarks.estimators.methods import EstimatorMethod, StepInput, directions, flattened, jvps_along
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import FloatArray
from edge_runtime.training.gradient import clamped
from edge_runtime.training.tangents import draw_tangents

#: Part of their mean that is added to the fitted second moments before roots are taken.
SOFTENING = 1e-3
#: Strength of the ridge, as a part of the residuals' mean second moment. Without it, a class that other devices hardly
#: have would get an arbitrary J.
RIDGE = 0.1
QUANTILE = 0.99
BY_LABEL = "dealt, rows by label"
#: With more dimensions than these, eigenvectors are not computed.
MOST_EIGENVECTORS = 1000


def gathered(jvps: FloatArray, flat: FloatArray) -> DoubleArray:
    """The mean of jvp·v over draws and examples, as one product."""
    draws, batch = jvps.shape
    made: DoubleArray = np.einsum("kb,kbn->n", jvps, flat, dtype=np.float64) / (draws * batch)
    return made


def controlled(step: StepInput, expected: Matrix) -> DoubleArray:
    """An estimate with a control variate: directions per example measure what is left beside the expected gradient.

    Args:
        step: step to estimate.
        expected: expected gradient of each example, (B, n), or of all alike, (1, n).
    """
    flat = flattened(directions(step, "per_example"))
    rest = step.gradients - expected
    return gathered(jvps_along(rest, flat), flat) + expected.mean(axis=0, dtype=np.float64)


def scaled(step: StepInput, scales: FloatArray, basis: Matrix | None = None) -> DoubleArray:
    """An estimate with directions Q s^-½ v for the derivative and Q s^½ v for the result.

    Args:
        step: step to estimate.
        scales: scale s of each direction, (n,).
        basis: orthogonal matrix Q, (n, n); None for the identity.
    """
    flat = flattened(directions(step, "per_example"))
    turned = step.gradients if basis is None else step.gradients @ basis
    root = np.sqrt(scales)
    made = gathered(jvps_along(turned / root, flat), flat * root)
    return made if basis is None else basis @ made


def momentum_direction(step: StepInput) -> DoubleArray:
    """An estimate whose first draw is along the last mean gradient, and whose others are orthogonal to it."""
    length = np.linalg.norm(step.last)
    if length == 0:  # the first round of a head of zeros
        return controlled(step, step.last[None])
    unit = step.last / length
    flat = flattened(directions(step, "per_example"))[1:]
    flat = flat - (flat @ unit)[..., None] * unit
    along: DoubleArray = (step.gradients.mean(axis=0, dtype=np.float64) @ unit) * unit
    return along + gathered(jvps_along(step.gradients, flat), flat)


def orthogonal_over(step: StepInput, each: int) -> DoubleArray:
    """An estimate along rows of one Hadamard matrix, which serves all draws and steps of a task.

    Args:
        step: step to estimate.
        each: examples of a batch that get rows of their own; 1 if they share them.
    """
    count = step.task.draws * each
    whole = msgspec.structs.replace(step.task, directions="orthogonal", draws=count * STEPS)
    rows = flattened(draw_tangents(whole, step.specs, 0, [0]))[:, 0]
    flat = rows[step.number * count : (step.number + 1) * count].reshape(step.task.draws, each, -1)
    jvps = jvps_along(step.gradients, flat)
    return gathered(jvps if each > 1 else jvps.mean(axis=1, keepdims=True), flat)


def by_label(snapshot: GradientSnapshot) -> GradientSnapshot:
    """The same rows, each device's in the order of their labels: the residual is least where the label is."""
    labels = snapshot.residuals.argmin(axis=1)
    rows = len(labels) // SLOTS
    order = np.concatenate(
        [
            first + np.argsort(labels[first : first + rows], kind="stable")
            for first in range(0, len(labels), rows)
        ]
    )
    return replace(snapshot, gradients=snapshot.gradients[order], residuals=snapshot.residuals[order])


def dealt_over_all(step: StepInput) -> DoubleArray:
    """An estimate along dealt directions of all slices together."""
    whole = SliceSpec("all", "lora_xs", (0,), "all", (TensorSpec("core", (1, len(step.columns)), "core"),))
    task = msgspec.structs.replace(step.task, directions="dealt")
    flat = flattened(draw_tangents(task, [whole], step.number, range(len(step.gradients))))
    return gathered(jvps_along(step.gradients, flat), flat)


def dealt_by_each(step: StepInput) -> DoubleArray:
    """An estimate along directions dealt from decks of the device's own: of another seed for each slot."""
    task = msgspec.structs.replace(
        step.task, directions="dealt", seed=step.task.seed * SLOTS + step.task.slot, slot=0
    )
    flat = flattened(draw_tangents(task, step.specs, step.number, range(len(step.gradients))))
    return gathered(jvps_along(step.gradients, flat), flat)


def unshipped_methods(snapshot: GradientSnapshot) -> dict[str, EstimatorMethod]:
    """All estimators of this module by name, fitted on the other devices' rows of a snapshot."""
    other = snapshot.other
    maps = residual_maps(snapshot)
    squares = softened((other**2).mean(axis=0, dtype=np.float64))

    @cache
    def eigen(columns: tuple[int, ...]) -> tuple[FloatArray, Matrix]:
        some = other[:, columns].astype(np.float64)
        values, vectors = np.linalg.eigh(some.T @ some / len(some))
        return np.sqrt(softened(values)).astype(np.float32), vectors.astype(np.float32)

    @cache
    def limit(columns: tuple[int, ...]) -> float:
        some = other[:, columns]
        signs = np.random.default_rng(0).choice(np.float32([-1, 1]), (16, *some.shape))
        return float(np.quantile(np.abs(jvps_along(some, signs)), QUANTILE))

    def clamp(step: StepInput) -> DoubleArray:
        flat = flattened(directions(step, "per_example"))
        return gathered(clamped(jvps_along(step.gradients, flat), limit(tuple(step.columns.tolist()))), flat)

    def coordinates(step: StepInput) -> DoubleArray:
        return scaled(step, np.sqrt(squares[step.columns]).astype(np.float32))

    found = {
        "mean control": EstimatorMethod(lambda step: controlled(step, step.last[None])),
        "residual control": EstimatorMethod(
            lambda step: controlled(step, step.residuals @ maps[:, step.columns])
        ),
        "coordinate scales": EstimatorMethod(coordinates),
        "momentum direction": EstimatorMethod(momentum_direction, least_draws=2),
        "orthogonal over steps": EstimatorMethod(lambda step: orthogonal_over(step, 1)),
        "orthogonal over examples": EstimatorMethod(lambda step: orthogonal_over(step, BATCH)),
        "dealt, all slices a draw": EstimatorMethod(dealt_over_all),
        "dealt by each device": EstimatorMethod(dealt_by_each),
        "clamped (biased)": EstimatorMethod(clamp, biased=True),
    }
    if other.shape[1] <= MOST_EIGENVECTORS:
        found["eigenvector scales"] = EstimatorMethod(
            lambda step: scaled(step, *eigen(tuple(step.columns.tolist())))
        )
    return found


def residual_maps(snapshot: GradientSnapshot) -> Matrix:
    """The map J (C, d) from residuals to gradients, fitted on the other devices' rows."""
    residuals = snapshot.other_residuals.astype(np.float64)
    moments = residuals.T @ residuals
    moments += RIDGE * moments.trace() / len(moments) * np.eye(len(moments))
    maps: Matrix = np.linalg.solve(moments, residuals.T @ snapshot.other).astype(np.float32)
    return maps


def softened(moments: DoubleArray) -> DoubleArray:
    """Second moments made larger than zero, by a part of their mean."""
    return np.maximum(moments, 0) + SOFTENING * moments.mean()
