"""One local step of training, from rows to gradients: :func:`take_step`, readable top to bottom.

:func:`take_exact_step` is the same step by backpropagation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.backpropagation import Backpropagation
from edge_runtime.data import Batch, IntArray, make_batch, padded_length
from edge_runtime.errors import PackageError
from edge_runtime.executor import Executor, Sweep
from edge_runtime.gradient import estimate, head_gradient, shared_jvps
from edge_runtime.messages import Task
from edge_runtime.package import SliceSpec
from edge_runtime.plan import Choice
from edge_runtime.slices import FloatArray, Values
from edge_runtime.tangents import PER_EXAMPLE, draw_tangents


@dataclass(frozen=True)
class Examples:
    """A device's rows as token ids and label indices, row by row; ``labels`` None for language modelling.

    ``pad_token_id`` fills batches, to lengths up to ``sequence_limit``.
    """

    ids: Sequence[Sequence[int]]
    labels: Sequence[int] | None
    pad_token_id: int
    sequence_limit: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row, as a batch holds it."""
        return padded_length(max(map(len, self.ids)), self.sequence_limit)

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, padded to the longest of them."""
        return make_batch(
            [self.ids[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
            pad_token_id=self.pad_token_id,
            sequence_limit=self.sequence_limit,
        )


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
    choice: Choice,
) -> Step | None:
    """Estimate the gradient of the assigned slices, and compute that of the head.

    Args:
        executor: loaded for the task's slices.
        task: gives draws, directions and whether the head is trained.
        number: of the step within the task; part of the tangents' counter.
        specs: the assigned slices.
        values: of all slices, at which the gradient is taken.
        examples: the device's rows. chosen: which of them make the batch.
        choice: how many examples and draws run at a time.

    Returns:
        The step, or None if a loss or a jvp was not finite: such a step must not be applied.
    """
    # 1. Group examples of like length; an example keeps its position in the batch as part of its tangent's key.
    groups, rows, batches = _grouped(examples, chosen, choice)
    # 2. Draw a direction per draw and example.
    tangents = [draw_tangents(task, specs, number, group) for group in groups]
    # 3. Sweeps through the segments give loss and directional derivatives of each example, some draws at a time.
    jvps = []
    for first in range(0, task.draws if specs else 1, choice.draws_at_a_time):
        drawn = slice(first, first + choice.draws_at_a_time)
        some = [{name: tangent[drawn] for name, tangent in group.items()} for group in tangents]
        sweep = executor.sweep(values, batches, some, rows)
        if not _finite(sweep):
            return None
        if sweep.jvps is not None:
            jvps.append(sweep.jvps)
    # 4. Forward gradient of the slices, made of few numbers in the order of the batch; exact gradient of the head.
    if not jvps:
        return _with_head(executor, task, {}, sweep)
    positions = np.argsort([position for group in groups for position in group])
    scalars = np.concatenate(jvps)[:, positions]
    if task.directions not in PER_EXAMPLE:
        scalars = shared_jvps(scalars)
    drawn_again = draw_tangents(task, specs, number, range(scalars.shape[1]))
    return _with_head(executor, task, estimate(scalars, drawn_again), sweep, scalars)


def take_exact_step(
    executor: Backpropagation,
    task: Task,
    values: Values,
    examples: Examples,
    chosen: IntArray,
    choice: Choice,
) -> Step | None:
    """The exact gradient of the assigned slices and of the head; arguments as of :func:`take_step`.

    Returns:
        The step, or None if a loss or an entry of the gradient was not finite.
    """
    _, rows, batches = _grouped(examples, chosen, choice)
    sweep, gradient = executor.gradient(values, batches, rows)
    if not _finite(sweep) or not all(bool(np.isfinite(array).all()) for array in gradient.values()):
        return None
    return _with_head(executor, task, gradient, sweep)


def _grouped(
    examples: Examples, chosen: IntArray, choice: Choice
) -> tuple[list[list[int]], list[list[int]], list[Batch]]:
    """A step's micro-batches: their positions in the batch, their rows, and themselves."""
    groups = group_by_length([examples.ids[row] for row in chosen], choice.micro_batch)
    rows = [[int(chosen[position]) for position in group] for group in groups]
    return groups, rows, [examples.batch(group) for group in rows]


def _with_head(
    executor: Executor, task: Task, gradient: Values, sweep: Sweep, scalars: FloatArray | None = None
) -> Step:
    """The step: the slices' gradient, and the head's if it is trained."""
    head = executor.manifest.head
    if head is not None and task.train_head:
        if sweep.residual is None or sweep.features is None:
            raise PackageError("the package has a head, and its programs do not give what trains it")
        gradient = {**gradient, **head_gradient(sweep.residual, sweep.features, head.name)}
    return Step(gradient, float(sweep.loss.sum(dtype=np.float64)), scalars)


def group_by_length(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Positions in groups of ``size``, like lengths together, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda position: (len(ids[position]), position))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _finite(sweep: Sweep) -> bool:
    arrays = (sweep.loss, sweep.residual, sweep.jvps)
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)
