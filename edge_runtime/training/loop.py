"""A task's local steps, from the values it came with to the change it hands back: :func:`train_locally`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.data.batches import draw_batches
from edge_runtime.package.slices import FloatArray, Values, shapes
from edge_runtime.protocol.messages import Task
from edge_runtime.training.estimators import estimator_of
from edge_runtime.training.line import LINE, mean_along
from edge_runtime.training.optimizers import Optimizer, make_optimizer
from edge_runtime.training.progress import Keeper, Progress
from edge_runtime.training.replay import SCALARS, STEPS
from edge_runtime.training.sketch import sketch_of, sketched
from edge_runtime.training.step import LocalWork
from edge_runtime.training.step_exit import step_exit
from edge_runtime.training.step_rank import step_rank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What local training did.

    Attributes:
        delta: values after the task minus values before, or scalars from which the same is made; the task hands it
            back.
        examples: number of rows that entered applied steps.
        steps_applied: number of steps whose gradient was taken.
        steps_skipped: number of steps left out because something was not finite.
        loss_sum: sum of the losses of these rows.
    """

    delta: Values
    examples: int
    steps_applied: int
    steps_skipped: int
    loss_sum: float


def train_locally(
    work: LocalWork,
    values: Values,
    stepped: Callable[[], None] = lambda: None,
    keeper: Keeper | None = None,
) -> Trained:
    """Take a task's local steps.

    Args:
        work: parts that all steps share.
        values: values of all slices, as the task came with them.
        stepped: function called after each step.
        keeper: what keeps the progress, and knows of it from before; None keeps none.

    Raises:
        WorkerError: the process was told to stop; its progress is kept.
    """
    task, row_count = work.task, len(work.examples.ids)
    estimator = estimator_of(work)
    optimizer = make_optimizer(
        task.optimizer,
        values,
        list(shapes([*work.estimated_slices, *work.exact_heads])),
        sketch_of(task),
    )
    batches = draw_batches(
        row_count,
        seed=task.seed,
        round_number=task.round,
        slot=task.slot,
        steps=count_steps(task, row_count),
        batch_size=task.batch_size,
    )
    scalars: list[FloatArray] = []
    lines: list[tuple[float, float]] = []
    applied: list[int] = []
    seen, loss_sum = 0, 0.0
    begun = keeper.before() if keeper else None
    first = 0
    if begun is not None:
        optimizer.restore(begun.tensors)
        first, applied, seen, loss_sum = begun.number, list(begun.applied), begun.seen, begun.loss_sum
        scalars = list(begun.tensors.get(SCALARS, ()))
        lines = [(float(slope), float(curvature)) for slope, curvature in begun.tensors.get(LINE, ())]
    for number, rows in enumerate(batches):
        if number < first:
            continue
        if keeper and number > first:
            keeper.after_step(
                lambda: _progress(number, applied, seen, loss_sum, optimizer, scalars, lines)  # noqa: B023 - called at once
            )
        values_now = optimizer.values()
        if task.exits:
            work.executor.leave_at(step_exit(task, number))
        ranks = step_rank(task, work.executor.manifest.slices, number)
        step = estimator.step(number, values_now if ranks is None else ranks.values(values_now), rows)
        stepped()
        if step is None:
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, number)
            continue
        optimizer.step(step.gradient if ranks is None else ranks.whole(step.gradient, values_now))
        applied.append(number)
        seen, loss_sum = seen + len(rows), loss_sum + step.loss_sum
        if step.scalars is not None:
            scalars.append(step.scalars)
        if step.line is not None:
            lines.append(step.line)
    delta = optimizer.delta()
    if task.report == "scalars":
        replayed = set(shapes(work.estimated_slices))
        delta = {name: moved for name, moved in delta.items() if name not in replayed}
        if scalars:
            delta |= {SCALARS: np.stack(scalars), STEPS: np.array(applied, np.float32)}
    sketch = sketch_of(task)
    if task.report == "sketch" and sketch is not None:
        delta = sketched(delta, work.estimated_slices, sketch)
    delta = delta | mean_along(lines)
    return Trained(delta, seen, len(applied), len(batches) - len(applied), loss_sum)


def _progress(
    number: int,
    applied: list[int],
    seen: int,
    loss_sum: float,
    optimizer: Optimizer,
    scalars: list[FloatArray],
    lines: list[tuple[float, float]],
) -> Progress:
    """How far the steps have come, before one of them."""
    told = {SCALARS: np.stack(scalars)} if scalars else {}
    measured = {LINE: np.asarray(lines, np.float64)} if lines else {}
    return Progress(number, tuple(applied), seen, loss_sum, {**optimizer.state(), **told, **measured})


def count_steps(task: Task, row_count: int) -> int:
    """Number of steps on a device with so many rows: ``epochs`` passes over them, at most ``steps``."""
    if not task.epochs:
        return task.steps
    return min(task.steps, -(-row_count * task.epochs // min(task.batch_size, row_count)))
