"""Forward mode: directional derivatives from dual programs, and the estimate made of them.

A step is :meth:`ForwardMode.step`, readable top to bottom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.data.batches import IntArray
from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Sweep
from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values
from edge_runtime.protocol.messages import PER_EXAMPLE
from edge_runtime.training.gradient import clamped, estimate, head_jvps, shared_jvps
from edge_runtime.training.losses import apply_loss
from edge_runtime.training.step import LocalWork, Step, finite, head_parts, with_exact_head
from edge_runtime.training.tangents import draw_tangents


class ForwardMode:
    """Estimates the gradient by forward mode; see :class:`edge_runtime.training.step.Estimator`."""

    def __init__(self, work: LocalWork) -> None:
        self._work = work

    def step(self, number: int, values: Values, rows: IntArray) -> Step | None:
        """See :meth:`edge_runtime.training.step.Estimator.step`."""
        work, task, executor = self._work, self._work.task, self._work.executor
        # 1. Group examples of like length; an example keeps its position in the batch as part of its tangent's key.
        parts = work.micro_batches(rows)
        # 2. Draw a direction per draw and example, or one for all examples.
        shared = task.directions not in PER_EXAMPLE
        keyed = [0] if shared else range(len(rows))
        tangents = draw_tangents(task, work.estimated_slices, number, keyed, work.reference)
        # 3. Sweeps through the segments give loss and directional derivatives of each example, some draws at a time.
        together = work.choice.draws_at_a_time if executor.first_trained is not None else task.draws
        order = [position for group in parts.positions for position in group]
        jvps = []
        for first in range(0, task.draws, together):
            drawn = {name: tangent[first : first + together] for name, tangent in tangents.items()}
            by_part = [_of_examples(drawn, group, shared) for group in parts.positions]
            sweep = apply_loss(task, executor.sweep(values, parts.batches, by_part, parts.rows))
            if not finite(sweep):
                return None
            jvps.append(_jvps(sweep, drawn, order))
        # 4. Forward gradient of the slices, made of few numbers in the order of the batch; exact gradient of the head.
        scalars = np.concatenate(jvps)
        if not np.isfinite(scalars).all():
            return None
        scalars = clamped(shared_jvps(scalars) if shared else scalars, task.jvp_limit)
        return with_exact_head(work, estimate(scalars, tangents), sweep, scalars)


def _of_examples(drawn: Values, group: Sequence[int], shared: bool) -> Values:
    """The slices' tangents (k, b, *s) for one micro-batch. The head's are used elsewhere (:func:`_jvps`)."""
    return {
        name: tangent.repeat(len(group), axis=1) if shared else tangent[:, group]
        for name, tangent in drawn.items()
        if not name.startswith(HEAD_PREFIX)
    }


def _jvps(sweep: Sweep, drawn: Values, order: Sequence[int]) -> FloatArray:
    """Directional derivatives (k, B) in the order of the batch, those along a perturbed head's tangents included.

    Args:
        sweep: outputs of a sweep.
        drawn: tangents of the sweep's draws, by flat name.
        order: position in the batch of each of the sweep's examples.
    """
    positions = np.argsort(order)
    jvps = None if sweep.jvps is None else sweep.jvps[:, positions]
    heads = {name: tangent for name, tangent in drawn.items() if name.startswith(HEAD_PREFIX)}
    if heads:
        residual, features = head_parts(sweep)
        moved = head_jvps(residual[positions], features[positions], heads)
        jvps = moved if jvps is None else jvps + moved
    if jvps is None:
        raise PackageError("the package's programs do not give directional derivatives")
    return jvps
