"""The exact gradient of slices and head, by backpropagation over adjoint programs."""

from __future__ import annotations

from functools import partial

import numpy as np

from edge_runtime.data.batches import IntArray
from edge_runtime.errors import PackageError
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.package.slices import Values, shapes
from edge_runtime.training.losses import apply_loss, slopes
from edge_runtime.training.step import LocalWork, Step, finite, with_exact_head
from edge_runtime.training.step_rank import step_rank


class ExactGradient:
    """Computes the gradient by backpropagation; see :class:`edge_runtime.training.step.Estimator`.

    Raises:
        PackageError: the executor has no adjoint programs.
    """

    def __init__(self, work: LocalWork) -> None:
        if not isinstance(work.executor, Backpropagation):
            raise PackageError("an exact gradient needs the package's adjoint programs, and none are loaded")
        self._work, self._executor = work, work.executor

    def step(self, number: int, values: Values, rows: IntArray) -> Step | None:
        """See :meth:`edge_runtime.training.step.Estimator.step`."""
        work = self._work
        parts = work.micro_batches(rows)
        sweep, gradient = self._executor.gradient(
            values, parts.batches, parts.rows, partial(slopes, work.task)
        )
        sweep = apply_loss(work.task, sweep)
        if not finite(sweep) or not all(bool(np.isfinite(array).all()) for array in gradient.values()):
            return None
        wanted = {name: gradient[name] for name in shapes(work.estimated_slices)}
        ranks = step_rank(work.task, self._executor.manifest.slices, number)
        return with_exact_head(work, wanted if ranks is None else ranks.narrowed(wanted), sweep)
