"""A task's local steps on programs that are loaded already, as the worker takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.backpropagation import Backpropagation
from edge_runtime.data import draw_batches
from edge_runtime.executor import Executor
from edge_runtime.messages import Task
from edge_runtime.optimizers import make_optimizer
from edge_runtime.package import SliceSpec
from edge_runtime.plan import Choice
from edge_runtime.slices import Values, shapes
from edge_runtime.step import Examples, take_exact_step, take_step


@dataclass(frozen=True)
class Trained:
    """What a task's steps gave: the change of the trained values, and the summed loss of the examples seen."""

    change: Values
    examples: int
    steps_applied: int
    steps_skipped: int
    loss_sum: float


def train_locally(
    executor: Executor,
    task: Task,
    specs: Sequence[SliceSpec],
    heads: Sequence[SliceSpec],
    values: Values,
    examples: Examples,
    choice: Choice,
) -> Trained:
    """Take all steps of a task.

    Args:
        executor: loaded for the task's slices.
        task: what to do.
        specs: its slices. heads: the head, if it is trained.
        values: of all slices, as the task came with them.
        examples: the device's rows.
        choice: how a step's work is done.
    """
    optimizer = make_optimizer(task.optimizer, values, list(shapes([*specs, *heads])))
    batches = draw_batches(
        len(examples.ids),
        seed=task.seed,
        round_number=task.round,
        slot=task.slot,
        steps=task.steps,
        batch_size=task.batch_size,
    )
    applied, seen, loss_sum = 0, 0, 0.0
    for number, chosen in enumerate(batches):
        now = optimizer.values()
        if isinstance(executor, Backpropagation):
            step = take_exact_step(executor, task, now, examples, chosen, choice)
        else:
            step = take_step(executor, task, number, specs, now, examples, chosen, choice)
        if step is None:
            continue
        optimizer.step(step.gradient)
        applied, seen, loss_sum = applied + 1, seen + len(chosen), loss_sum + step.loss_sum
    return Trained(optimizer.change(), seen, applied, len(batches) - applied, loss_sum)
