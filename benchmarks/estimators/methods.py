"""What the package offers, judged on a gradient matrix: the runtime's own directions and its own estimate.

The directional derivative of example i along v is g_i·v, taken from the matrix of exact gradients; all else is what
runs on a device. Differences of losses are taken in their limit of a small step, where they are g·v too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.estimators.errors import DoubleArray
from benchmarks.estimators.exact_gradients import BATCH, STEPS, Matrix
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, shapes
from edge_runtime.protocol.messages import PER_EXAMPLE, Directions, LocalOptimizer, Task
from edge_runtime.training.gradient import estimate, shared_jvps
from edge_runtime.training.tangents import draw_tangents

#: Normal directions from which each filtered direction is chosen.
CANDIDATES = 10


@dataclass(frozen=True)
class StepInput:
    """One step of one device.

    Attributes:
        task: task with the seed, round, slot and draws of the device.
        specs: slices that the device trains, n numbers together.
        columns: indices of these numbers among all d, (n,).
        number: number of the step within the task.
        gradients: exact gradient of each example, (B, n).
        residuals: softmax minus one-hot of each example, (B, C).
        last: mean gradient of the round before, (n,).
    """

    task: Task
    specs: tuple[SliceSpec, ...]
    columns: NDArray[np.int64]
    number: int
    gradients: Matrix
    residuals: Matrix
    last: FloatArray


Estimator = Callable[[StepInput], DoubleArray]


@dataclass(frozen=True)
class EstimatorMethod:
    """A way to estimate a gradient.

    Attributes:
        estimate: function that gives the estimate of one step.
        way: how derivatives are found: ``forward`` mode or ``central`` differences.
        biased: whether the mean of its estimates is another than the gradient.
        least_draws: fewest draws that it can work with.
    """

    estimate: Estimator
    way: str = "forward"
    biased: bool = False
    least_draws: int = 1


def make_task(slices: tuple[str, ...], round_number: int, slot: int, seed: int, draws: int) -> Task:
    """A task with everything that directions depend on; its other fields mean nothing."""
    return Task(
        task_id="estimators",
        run_id="estimators",
        round=round_number,
        slot=slot,
        seed=seed,
        package="0" * 64,
        package_signature="A" * 86 + "==",
        state="0" * 64,
        slices=slices,
        train_head=True,
        steps=STEPS,
        batch_size=BATCH,
        draws=draws,
        sequence_limit=64,
        optimizer=LocalOptimizer(),
        required_bytes=0,
        deadline_s=0.0,
        candidates=CANDIDATES,
    )


def directions(step: StepInput, kind: Directions) -> Values:
    """The runtime's tangents (K, b, *s); b is the number of examples, or 1 where they share directions."""
    task = msgspec.structs.replace(step.task, directions=kind)
    examples = range(len(step.gradients)) if kind in PER_EXAMPLE else [0]
    reference = cut(-step.last, step.specs) if kind == "filtered" else None
    return draw_tangents(task, step.specs, step.number, examples, reference)


def flattened(tensors: Values) -> FloatArray:
    """Tangents (K, b, *s) of all slices side by side, as (K, b, n)."""
    return np.concatenate([each.reshape(*each.shape[:2], -1) for each in tensors.values()], axis=2)


def cut(flat: FloatArray, specs: tuple[SliceSpec, ...]) -> Values:
    """A vector (n,) as the slices' tensors."""
    values, start = {}, 0
    for name, shape in shapes(specs).items():
        size = int(np.prod(shape))
        values[name] = flat[start : start + size].reshape(shape)
        start += size
    return values


def jvps_along(gradients: Matrix, flat: FloatArray) -> FloatArray:
    """Derivatives g_i·v, (K, B), along directions (K, B, n), or along shared ones (K, 1, n)."""
    if flat.shape[1] == 1:
        shared: FloatArray = flat[:, 0] @ gradients.T
        return shared
    own: FloatArray = (flat * gradients[None]).sum(axis=2)
    return own


def shipped(kind: Directions) -> Estimator:
    """The runtime's own estimate, from its own directions of one kind."""

    def run(step: StepInput) -> DoubleArray:
        tangents = directions(step, kind)
        jvps = jvps_along(step.gradients, flattened(tangents))
        if kind not in PER_EXAMPLE:
            jvps = shared_jvps(jvps)
        found = estimate(jvps, tangents)
        return np.concatenate([found[name].ravel() for name in shapes(step.specs)]).astype(np.float64)

    return run


def exact(step: StepInput) -> DoubleArray:
    """The exact mean gradient, as backpropagation gives it."""
    mean: DoubleArray = step.gradients.mean(axis=0, dtype=np.float64)
    return mean


SHIPPED = {
    "per_example": EstimatorMethod(shipped("per_example")),
    "one_slice": EstimatorMethod(shipped("one_slice")),
    "dealt": EstimatorMethod(shipped("dealt")),
    "shared": EstimatorMethod(shipped("shared")),
    "orthogonal": EstimatorMethod(shipped("orthogonal")),
    "gaussian": EstimatorMethod(shipped("gaussian")),
    "filtered (biased)": EstimatorMethod(shipped("filtered"), biased=True),
    "zero order, shared": EstimatorMethod(shipped("shared"), way="central"),
}
