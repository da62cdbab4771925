"""One local step of training, from rows to gradients: :func:`take_step`, readable top to bottom.

:func:`take_exact_step` is the same step by backpropagation,
:func:`edge_runtime.training.zero_order.take_zero_order_step` by differences of losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edge_runtime.data.batches import Batch, IntArray
from edge_runtime.data.examples import Examples, group_by_length
from edge_runtime.errors import PackageError
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values, shapes
from edge_runtime.protocol.messages import PER_EXAMPLE, Task
from edge_runtime.training.gradient import clamped, estimate, head_gradient, head_jvps, shared_jvps
from edge_runtime.training.losses import apply_loss, slopes
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.training.trainable import exact


@dataclass(frozen=True)
class Step:
    """What a step gives.

    Attributes:
        gradient: of each trained tensor. loss_sum: over the step's examples.
        scalars: (K, b) numbers of which the slices' estimate was made, b = 1 where examples share directions; None
            where nothing was estimated.
    """

    gradient: Values
    loss_sum: float
    scalars: FloatArray | None = None


def take_step(
    executor: Executor,
    task: Task,
    number: int,
    specs: Sequence[SliceSpec],
    values: Values,
    examples: Examples,
    chosen: IntArray,
    choice: ExecutionChoice,
    reference: Values | None = None,
) -> Step | None:
    """Estimate the gradient of some slices by forward mode, and compute that of a head which is not among them.

    Args:
        executor: loaded for the task's slices.
        task: gives draws, directions, loss and whether the head is trained.
        number: of the step within the task; part of the tangents' counter.
        specs: what is estimated (:func:`edge_runtime.training.trainable.estimated`).
        values: of all slices, at which the gradient is taken.
        examples: the device's rows. chosen: which of them make the batch.
        choice: how many examples and draws run at a time.
        reference: what filtered directions are compared with; None if there is nothing yet.

    Returns:
        The step, or None if a loss or a jvp was not finite: such a step must not be applied.
    """
    # 1. Group examples of like length; an example keeps its position in the batch as part of its tangent's key.
    groups, rows, batches = grouped(examples, chosen, choice)
    # 2. Draw a direction per draw and example, or one for all examples.
    shared = task.directions not in PER_EXAMPLE
    tangents = draw_tangents(task, specs, number, [0] if shared else range(len(chosen)), reference)
    # 3. Sweeps through the segments give loss and directional derivatives of each example, some draws at a time.
    together = choice.draws_at_a_time if executor.first_trained is not None else task.draws
    jvps = []
    for first in range(0, task.draws if specs else 1, together):
        drawn = {name: tangent[first : first + together] for name, tangent in tangents.items()}
        some = [_of_examples(drawn, group, shared) for group in groups]
        sweep = apply_loss(task, executor.sweep(values, batches, some, rows))
        if not finite(sweep):
            return None
        if specs:
            jvps.append(_jvps(sweep, drawn, [position for group in groups for position in group]))
    # 4. Forward gradient of the slices, made of few numbers in the order of the batch; exact gradient of the head.
    if not jvps:
        return with_head(executor, task, {}, sweep)
    scalars = np.concatenate(jvps)
    if not np.isfinite(scalars).all():
        return None
    scalars = clamped(shared_jvps(scalars) if shared else scalars, task.jvp_limit)
    return with_head(executor, task, estimate(scalars, tangents), sweep, scalars)


def take_exact_step(
    executor: Backpropagation,
    task: Task,
    specs: Sequence[SliceSpec],
    values: Values,
    examples: Examples,
    chosen: IntArray,
    choice: ExecutionChoice,
) -> Step | None:
    """The exact gradient of the assigned slices and of the head; arguments as of :func:`take_step`.

    Returns:
        The step, or None if a loss or an entry of the gradient was not finite.
    """
    _, rows, batches = grouped(examples, chosen, choice)
    sweep, gradient = executor.gradient(values, batches, rows, partial(slopes, task))
    sweep = apply_loss(task, sweep)
    if not finite(sweep) or not all(bool(np.isfinite(array).all()) for array in gradient.values()):
        return None
    return with_head(executor, task, {name: gradient[name] for name in shapes(specs)}, sweep)


def grouped(
    examples: Examples, chosen: IntArray, choice: ExecutionChoice
) -> tuple[list[list[int]], list[list[int]], list[Batch]]:
    """A step's micro-batches: their positions in the batch, their rows, and themselves."""
    groups = group_by_length([examples.ids[row] for row in chosen], choice.micro_batch)
    rows = [[int(chosen[position]) for position in group] for group in groups]
    return groups, rows, [examples.batch(group) for group in rows]


def with_head(
    executor: Executor, task: Task, gradient: Values, sweep: Sweep, scalars: FloatArray | None = None
) -> Step:
    """The step: the slices' gradient, and the head's if it is trained and not estimated."""
    for head in exact(task, executor.manifest.slices):
        residual, features = _head_parts(sweep)
        gradient = {**gradient, **head_gradient(residual, features, head.name)}
    return Step(gradient, float(sweep.loss.sum(dtype=np.float64)), scalars)


def finite(sweep: Sweep) -> bool:
    """Whether losses, residuals and directional derivatives are finite numbers."""
    arrays = (sweep.loss, sweep.residual, sweep.jvps)
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)


def _of_examples(drawn: Values, group: Sequence[int], shared: bool) -> Values:
    """The slices' tangents (k, b, *s) of one micro-batch; the head's go another way."""
    return {
        name: tangent.repeat(len(group), axis=1) if shared else tangent[:, group]
        for name, tangent in drawn.items()
        if not name.startswith(HEAD_PREFIX)
    }


def _jvps(sweep: Sweep, drawn: Values, order: Sequence[int]) -> FloatArray:
    """Directional derivatives (k, B) in the order of the batch, those of a perturbed head included.

    ``order`` has the position in the batch of each of the sweep's examples.
    """
    positions = np.argsort(order)
    jvps = None if sweep.jvps is None else sweep.jvps[:, positions]
    heads = {name: tangent for name, tangent in drawn.items() if name.startswith(HEAD_PREFIX)}
    if heads:
        residual, features = _head_parts(sweep)
        moved = head_jvps(residual[positions], features[positions], heads)
        jvps = moved if jvps is None else jvps + moved
    if jvps is None:
        raise PackageError("the package's programs do not give directional derivatives")
    return jvps


def _head_parts(sweep: Sweep) -> tuple[FloatArray, FloatArray]:
    if sweep.residual is None or sweep.features is None:
        raise PackageError("the package has a head, and its programs do not give what trains it")
    return sweep.residual, sweep.features
