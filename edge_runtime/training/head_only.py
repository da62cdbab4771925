"""The head alone: one primal sweep gives its exact gradient, and nothing is estimated."""

from __future__ import annotations

from edge_runtime.data.batches import IntArray
from edge_runtime.package.slices import Values
from edge_runtime.training.losses import apply_loss
from edge_runtime.training.step import LocalWork, Step, finite, with_exact_head


class HeadOnly:
    """Trains no slice; see :class:`edge_runtime.training.step.Estimator`."""

    def __init__(self, work: LocalWork) -> None:
        self._work = work

    def step(self, number: int, values: Values, rows: IntArray) -> Step | None:
        """See :meth:`edge_runtime.training.step.Estimator.step`."""
        work = self._work
        parts = work.micro_batches(rows)
        sweep = apply_loss(work.task, work.executor.sweep(values, parts.batches, rows=parts.rows))
        return with_exact_head(work, {}, sweep) if finite(sweep) else None
