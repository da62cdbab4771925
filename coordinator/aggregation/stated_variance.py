"""What a contribution weighs beside others whose gradients were found in another way (``update = "best"``).

A mean of independent contributions varies least where each is weighed by the inverse of its variance. With gradients
g_i of B examples, mean ḡ, and K draws of d entries, the variance of one step's mean gradient of a tensor is about

    exact:                E‖g_i‖² / B                        for B examples, seen as a sample
    directions per example: that · (1 + (d - 1)/K)           (docs/results/estimators.md; S·d_s for d of ``one_slice``)
    shared directions:    that · (1 + B·(d ± 1)/K) at most   where examples agree; + for normal entries

Of ``dealt`` directions the second is an upper bound. Two contributions of equally many examples are therefore weighed
as 1 to K/(K + d - 1). The factor is stated by the result, by naming its estimator and its draws, and not measured: a
measured one would itself be noise, and would bias the mean. That devices' own means differ, whatever the estimator, is
left out; it makes such weights a little more unequal than the best would be.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import shapes
from edge_runtime.protocol.messages import ONE_SLICE, PER_EXAMPLE, BestOf, Task
from edge_runtime.training.trainable import estimated_slices


def variance_factors(
    task: Task, specs: Sequence[SliceSpec], update: BestOf | None, draws: int
) -> dict[str, float]:
    """How many times the variance of exact gradients a contribution has, for each tensor that was estimated.

    Args:
        task: task of the contribution.
        specs: all slices of the package.
        update: how the device found its gradients, as the result states it; None of a task that left it no choice:
            its contributions are all alike.
        draws: number of draws of its estimates; 0 of exact gradients.

    Returns:
        factors by flat name; empty where all are 1. The head's gradient is exact.
    """
    if update != "forward":
        return {}
    slices = estimated_slices(task, specs)
    together = sum(spec.dimensions for spec in slices)
    factors: dict[str, float] = {}
    for spec in slices:
        entries = len(slices) * spec.dimensions if task.directions in ONE_SLICE else together
        excess = entries + 1 if task.directions == "gaussian" else entries - 1
        examples = 1 if task.directions in PER_EXAMPLE else task.batch_size
        factors |= dict.fromkeys(shapes([spec]), 1 + examples * excess / draws)
    return factors
