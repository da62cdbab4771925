"""A step by zero order: directional derivatives from differences of losses, by primal programs alone.

Along a direction v, shared by the batch, and with the batch's mean loss ℓ,

    central: (ℓ(θ + hv) - ℓ(θ - hv)) / 2h = ∇ℓ·v + O(h²)
    forward: (ℓ(θ + hv) - ℓ(θ)) / h       = ∇ℓ·v + O(h)

The estimate made of them is that of forward mode. MeZO (Malladi et al. 2023, arXiv 2305.17333) is one central draw,
BAFFLE (arXiv 2301.12195) many forward draws, FwdLLM (arXiv 2308.13894) central draws of filtered directions. Losses are
float32: for small h their rounding, divided by h, is the larger error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.data.batches import IntArray
from edge_runtime.data.examples import Examples
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import Task
from edge_runtime.training.gradient import clamped, estimate
from edge_runtime.training.losses import apply_loss
from edge_runtime.training.step import Step, finite, grouped, with_head
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.training.trainable import exact


def take_zero_order_step(
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
    """Estimate the gradient of some slices, and compute that of a head which is not among them.

    Args:
        executor: of primal programs (``carries_tangents=False``). All others as of
            :func:`edge_runtime.training.step.take_step`.

    Returns:
        The step, or None if a loss was not finite. Without a pass at the values themselves its loss is the mean of
        all passes, which differs by O(h²).
    """
    _, rows, batches = grouped(examples, chosen, choice)
    tangents = draw_tangents(task, specs, number, [0], reference)

    def sweep_at(distance: float, draw: int = 0) -> Sweep:
        return apply_loss(task, executor.sweep(_moved(values, tangents, draw, distance), batches, rows=rows))

    # 1. One pass at the values: for forward differences, and for the head's exact gradient.
    size, base = task.difference_step, None
    if task.difference == "forward" or not specs or exact(task, executor.manifest.slices):
        base = sweep_at(0.0)
        if not finite(base):
            return None
    if base is not None and not specs:
        return with_head(executor, task, {}, base)
    # 2. One or two passes a draw, at values moved along its direction.
    differences, losses = [], []
    for draw in range(task.draws):
        ahead = _mean_loss(sweep_at(size, draw))
        behind = _mean_loss(base if base and task.difference == "forward" else sweep_at(-size, draw))
        differences.append((ahead - behind) / (size if task.difference == "forward" else 2 * size))
        losses.append((ahead + behind) / 2)
    scalars = np.array(differences, dtype=np.float32)[:, None]
    if not np.isfinite(scalars).all():
        return None
    # 3. The estimate of these numbers.
    scalars = clamped(scalars, task.jvp_limit)
    gradient = estimate(scalars, tangents)
    if base is None:
        return Step(gradient, float(np.mean(losses)) * len(chosen), scalars)
    return with_head(executor, task, gradient, base, scalars)


def _moved(values: Values, tangents: Values, draw: int, distance: float) -> Values:
    """The values, with those that have a tangent (K, 1, *s) moved along draw's."""
    if distance == 0.0:
        return values
    return {
        **values,
        **{
            name: values[name] + np.float32(distance) * tangent[draw].reshape(values[name].shape)
            for name, tangent in tangents.items()
        },
    }


def _mean_loss(sweep: Sweep) -> float:
    return float(sweep.loss.mean(dtype=np.float64))
