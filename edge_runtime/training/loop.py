"""A task's local steps, from the values it came with to what is handed back: :func:`train_locally`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.data.batches import draw_batches
from edge_runtime.data.examples import Examples
from edge_runtime.engines.engine import Engine
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prefix_cache import ExampleStore
from edge_runtime.memory.plan import ExecutionChoice, first_segment
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import FloatArray, Values, shapes
from edge_runtime.protocol.messages import Task
from edge_runtime.training.optimizers import make_optimizer
from edge_runtime.training.replay import SCALARS, STEPS
from edge_runtime.training.step import take_exact_step, take_step
from edge_runtime.training.trainable import estimated, exact
from edge_runtime.training.zero_order import take_zero_order_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What local training did.

    Attributes:
        change: what the task hands back (see :class:`edge_runtime.protocol.messages.Result`).
        examples: rows that entered applied steps. loss_sum: over these rows.
    """

    change: Values
    examples: int
    steps_applied: int
    steps_skipped: int
    loss_sum: float


def train_locally(
    executor: Executor,
    task: Task,
    trained: Sequence[SliceSpec],
    values: Values,
    examples: Examples,
    choice: ExecutionChoice,
    stepped: Callable[[], None] = lambda: None,
    reference: Values | None = None,
) -> Trained:
    """Take a task's local steps.

    Args:
        executor: loaded for the task's slices.
        trained: the assigned slices, and the head if it is trained.
        values: of all slices, as the task came with them.
        examples: the device's rows.
        choice: how many examples and draws run at a time.
        stepped: called after each step.
        reference: what filtered directions are compared with; None if there is nothing yet.
    """
    specs = estimated(task, trained)
    optimizer = make_optimizer(task.optimizer, values, list(shapes([*specs, *exact(task, trained)])))
    batches = draw_batches(
        len(examples.ids),
        seed=task.seed,
        round_number=task.round,
        slot=task.slot,
        steps=count_steps(task, len(examples.ids)),
        batch_size=task.batch_size,
    )
    scalars: list[FloatArray] = []
    applied: list[int] = []
    seen, loss_sum = 0, 0.0
    for number, chosen in enumerate(batches):
        now = optimizer.values()
        if isinstance(executor, Backpropagation):
            step = take_exact_step(executor, task, specs, now, examples, chosen, choice)
        else:
            take = take_zero_order_step if task.update == "zero_order" else take_step
            step = take(executor, task, number, specs, now, examples, chosen, choice, reference)
        stepped()
        if step is None:
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, number)
            continue
        optimizer.step(step.gradient)
        applied.append(number)
        seen, loss_sum = seen + len(chosen), loss_sum + step.loss_sum
        if step.scalars is not None:
            scalars.append(step.scalars)
    change = optimizer.change()
    if task.report == "scalars":
        replayed = set(shapes(specs))
        change = {name: moved for name, moved in change.items() if name not in replayed}
        if scalars:
            change |= {SCALARS: np.stack(scalars), STEPS: np.array(applied, np.float32)}
    return Trained(change, seen, len(applied), len(batches) - len(applied), loss_sum)


def executor_of(
    task: Task,
    prepared: PreparedPackage,
    engine: Engine,
    choice: ExecutionChoice,
    cache: ExampleStore | None,
    spill_folder: Path | None = None,
) -> Executor:
    """What runs a task's sweeps; the head alone has nothing to propagate back to.

    Args:
        task: names the slices and how they are updated. choice: whether weights stay in memory.
        cache: of what the segments before the first slice give. spill_folder: as of :class:`Backpropagation`.
    """
    if task.update == "backprop" and first_segment(prepared.manifest, task.slices) is not None:
        return Backpropagation(prepared, engine, task.slices, choice.weights, cache, spill_folder)
    carries = task.update == "forward"
    return Executor(prepared, engine, task.slices, choice.weights, cache, carries_tangents=carries)


def count_steps(task: Task, row_count: int) -> int:
    """A task's steps on a device with so many rows: ``epochs`` passes over them, at most ``steps``."""
    if not task.epochs:
        return task.steps
    return min(task.steps, -(-row_count * task.epochs // min(task.batch_size, row_count)))
