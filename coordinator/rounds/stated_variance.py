"""What a contribution weighs beside others whose gradients were found in another way (``update = "best"``).

A mean of independent contributions varies least where each is weighed by the inverse of its variance. With gradients
g_i of B examples, and K draws of d entries, the variance of a device's mean gradient, as a sample of the fleet's, is
E‖g_i‖²/B times about

    exact:                    1 + c
    directions per example:   1 + c + (d - 1)/K      (docs/results/estimators.md)
    shared directions:        1 + c + B·(d ± 1)/K    at most, where examples agree; + for normal entries

where d is S·d_s for ``one_slice``, and c the variance of devices' own means beside that of their rows' mean
(:data:`SPREAD`). Of ``dealt`` directions the second is an upper bound. The factor, 1 + (d - 1)/((1 + c)·K), is stated
by the result, which names its estimator and its draws. It is not measured: that would be noise, and bias the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import shapes
from edge_runtime.protocol.messages import ONE_SLICE, PER_EXAMPLE, BestOf, Task
from edge_runtime.training.trainable import estimated_slices

#: Variance of the devices' own means over that of the mean of one device's rows. TREC's, of 40 rows, is 4.3, 4.3 and
#: 0.8 after 1, 5 and 25 rounds; of 0 to 3 this one erred least there (docs/decisions/0024-best-estimator.md).
SPREAD = 2.0


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
        factors |= dict.fromkeys(shapes([spec]), 1 + examples * excess / (1 + SPREAD) / draws)
    return factors
