"""One local step of training: what it works on, what it gives, and the one interface of all estimators.

An estimator finds the gradient of a task's slices on one batch. Each is a file of its own:
:mod:`~edge_runtime.training.forward_mode`, :mod:`~edge_runtime.training.zero_order`,
:mod:`~edge_runtime.training.exact_gradient` and, where a head learns alone, :mod:`~edge_runtime.training.head_only`.
:mod:`~edge_runtime.training.estimators` chooses among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from edge_runtime.data.batches import Batch, IntArray
from edge_runtime.data.examples import Examples, group_by_length
from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values
from edge_runtime.protocol.messages import Task
from edge_runtime.training.gradient import head_gradient
from edge_runtime.training.trainable import estimated_slices, exact_heads


@dataclass(frozen=True)
class LocalWork:
    """What all steps of a task share.

    Attributes:
        executor: programs loaded for the task's slices, of the kind its estimator needs.
        task: settings of the training.
        examples: the device's rows, tokenised.
        choice: number of examples and of draws that run at a time.
        reference: values that filtered directions are compared with, or the line along which the loss is measured
            (:mod:`edge_runtime.training.line`); None if there are none yet.
    """

    executor: Executor
    task: Task
    examples: Examples
    choice: ExecutionChoice
    reference: Values | None = None

    @cached_property
    def estimated_slices(self) -> list[SliceSpec]:
        """The slices whose gradient an estimator finds."""
        return estimated_slices(self.task, self.executor.manifest.slices)

    @cached_property
    def exact_heads(self) -> list[SliceSpec]:
        """The head, if its gradient is exact; else nothing."""
        return exact_heads(self.task, self.executor.manifest.slices)

    def micro_batches(self, rows: IntArray) -> MicroBatches:
        """A batch in parts that run one after the other, examples of like length together."""
        positions = group_by_length([self.examples.ids[row] for row in rows], self.choice.micro_batch)
        grouped = [[int(rows[position]) for position in group] for group in positions]
        return MicroBatches(positions, grouped, [self.examples.batch(group) for group in grouped])


@dataclass(frozen=True)
class MicroBatches:
    """A batch cut into parts.

    Attributes:
        positions: each part's positions in the batch.
        rows: each part's rows among the device's examples.
        batches: each part's padded token ids, masks and labels.
    """

    positions: list[list[int]]
    rows: list[list[int]]
    batches: list[Batch]


@dataclass(frozen=True)
class Step:
    """What a step gives.

    Attributes:
        gradient: gradient of each trained tensor, by flat name.
        loss_sum: sum of the losses of the step's examples.
        scalars: (K, b) directional derivatives that the estimate was made of, with b = 1 where examples share
            directions; None where nothing was estimated.
        line: slope and curvature of the loss along the task's line; None where it has none.
    """

    gradient: Values
    loss_sum: float
    scalars: FloatArray | None = None
    line: tuple[float, float] | None = None


class Estimator(Protocol):
    """Finds the gradient of a task's slices, and computes that of a head which is not among them."""

    def step(self, number: int, values: Values, rows: IntArray) -> Step | None:
        """The gradient on one batch.

        Args:
            number: the step's number within its task; part of the tangents' key.
            values: values of all slices, by flat name; the gradient is taken there.
            rows: rows among the device's examples that make the batch.

        Returns:
            The step, or None if a loss or derivative was not finite: such a step must not be applied.
        """
        ...


def with_exact_head(
    work: LocalWork, gradient: Values, sweep: Sweep, scalars: FloatArray | None = None
) -> Step:
    """The step: the slices' gradient, and the head's from the same sweep if it is trained by its exact gradient."""
    for head in work.exact_heads:
        residual, features = head_parts(sweep)
        has_bias = any(tensor.name == "bias" for tensor in head.tensors)
        gradient = {**gradient, **head_gradient(residual, features, head.name, has_bias=has_bias)}
    return Step(gradient, float(sweep.loss.sum(dtype=np.float64)), scalars)


def head_parts(sweep: Sweep) -> tuple[FloatArray, FloatArray]:
    """Residuals (B, C) and features (B, H) that a head's gradient is made of.

    Raises:
        PackageError: the package's programs do not give them.
    """
    if sweep.residual is None or sweep.features is None:
        raise PackageError("the package has a head, and its programs do not give what trains it")
    return sweep.residual, sweep.features


def finite(sweep: Sweep) -> bool:
    """Whether losses, residuals and directional derivatives are finite numbers."""
    arrays: Sequence[FloatArray | None] = (sweep.loss, sweep.residual, sweep.jvps)
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)
