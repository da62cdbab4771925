"""Zero order: directional derivatives from differences of losses, by primal programs alone.

Along a direction v, shared by the batch, and with the batch's mean loss ℓ,

    central: (ℓ(θ + hv) - ℓ(θ - hv)) / 2h = ∇ℓ·v + O(h²)
    forward: (ℓ(θ + hv) - ℓ(θ)) / h       = ∇ℓ·v + O(h)

The estimate is made of them as in forward mode. MeZO (Malladi et al. 2023, arXiv 2305.17333) takes one central draw,
BAFFLE (arXiv 2301.12195) many forward draws, FwdLLM (arXiv 2308.13894) central draws of filtered directions. Losses are
float32: for small h the larger error is their rounding, divided by h.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.data.batches import IntArray
from edge_runtime.execution.executor import Sweep
from edge_runtime.package.slices import Values
from edge_runtime.training.gradient import clamped, estimate
from edge_runtime.training.losses import apply_loss
from edge_runtime.training.step import LocalWork, MicroBatches, Step, finite, with_exact_head
from edge_runtime.training.step_exit import within
from edge_runtime.training.step_rank import step_rank
from edge_runtime.training.tangents import draw_tangents


class ZeroOrder:
    """Estimates the gradient by zero order; see :class:`edge_runtime.training.step.Estimator`.

    Where no pass is made at the values themselves, a step's loss is the mean of all passes, which differs by O(h²).
    """

    def __init__(self, work: LocalWork) -> None:
        self._work = work

    def step(self, number: int, values: Values, rows: IntArray) -> Step | None:
        """See :meth:`edge_runtime.training.step.Estimator.step`."""
        work, task = self._work, self._work.task
        parts = work.micro_batches(rows)
        ranks = step_rank(task, work.executor.manifest.slices, number)
        moved = within(task, work.estimated_slices, number)
        moved = moved if ranks is None else ranks.moved(moved)
        tangents = draw_tangents(task, moved, number, [0], work.reference)
        placed = tangents if ranks is None else ranks.placed(tangents)
        # 1. One pass at the values: for forward differences, and for the head's exact gradient.
        size, forward = task.difference_step, task.difference == "forward"
        base = self._sweep(values, parts) if forward or work.exact_heads else None
        if base is not None and not finite(base):
            return None
        # 2. One or two passes a draw, at values moved along its direction.
        differences, losses = [], []
        for draw in range(task.draws):
            ahead = _mean_loss(self._sweep(_moved(values, placed, draw, size), parts))
            behind = _mean_loss(
                base if base and forward else self._sweep(_moved(values, placed, draw, -size), parts)
            )
            differences.append((ahead - behind) / (size if forward else 2 * size))
            losses.append((ahead + behind) / 2)
        scalars = np.array(differences, dtype=np.float32)[:, None]
        if not np.isfinite(scalars).all():
            return None
        # 3. The estimate of these numbers.
        scalars = clamped(scalars, task.jvp_limit)
        gradient = estimate(scalars, tangents)
        if base is None:
            return Step(gradient, float(np.mean(losses)) * len(rows), scalars)
        return with_exact_head(work, gradient, base, scalars)

    def _sweep(self, values: Values, parts: MicroBatches) -> Sweep:
        return apply_loss(self._work.task, self._work.executor.sweep(values, parts.batches, rows=parts.rows))


def _moved(values: Values, tangents: Values, draw: int, distance: float) -> Values:
    """The values, of which those with a tangent (K, 1, *s) are moved along the given draw's."""
    return {
        **values,
        **{
            name: values[name] + np.float32(distance) * tangent[draw].reshape(values[name].shape)
            for name, tangent in tangents.items()
        },
    }


def _mean_loss(sweep: Sweep) -> float:
    return float(sweep.loss.mean(dtype=np.float64))
