"""The mean change of a round: example-weighted, for each slice over exactly the devices that trained it.

Memory is O(slices), whatever the number of devices: changes are read one at a time, in the order of their
places, and summed in float64. So the order in which results arrived cannot show, not even in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from coordinator.config import ServerOptimizers
from coordinator.server_optimizers import DoubleArray, Moments, step
from edge_runtime.slices import FloatArray, Values


@dataclass(frozen=True)
class Contribution:
    """One device's change: float32 by flat name, and the number of examples behind it."""

    examples: int
    change: Mapping[str, FloatArray]


def mean_change(contributions: Iterable[Contribution]) -> dict[str, DoubleArray]:
    """Per tensor: sum of examples times change, over the sum of examples, of those who sent the tensor.

    Args:
        contributions: in the order of their places; consumed one at a time.

    Returns:
        float64 means by flat name. A tensor that nobody trained on at least one example is missing.
    """
    sums: dict[str, DoubleArray] = {}
    weights: dict[str, int] = {}
    for contribution in contributions:
        if contribution.examples == 0:
            continue
        for name, change in contribution.change.items():
            weighted = change.astype(np.float64) * contribution.examples
            if name in sums:
                sums[name] += weighted
            else:
                sums[name] = weighted
            weights[name] = weights.get(name, 0) + contribution.examples
    return {name: sums[name] / weights[name] for name in sums}


def apply_changes(
    values: Values,
    moments: Mapping[str, Moments],
    changes: Mapping[str, DoubleArray],
    *,
    head: frozenset[str],
    optimizers: ServerOptimizers,
) -> tuple[Values, dict[str, Moments]]:
    """One server step on every tensor that has a change; the others keep values and optimiser state.

    Args:
        values: current values of all slices.
        moments: optimiser state by flat name; a missing entry is the initial state.
        changes: from :func:`mean_change`.
        head: flat names of the head's tensors.
        optimizers: the run's configuration.
    """
    new_values, new_moments = dict(values), dict(moments)
    for name in sorted(changes):
        config = optimizers.head if name in head else optimizers.slices
        before = moments.get(name) or Moments.initial(values[name].shape, config)
        new_values[name], new_moments[name] = step(values[name], changes[name], before, config)
    return new_values, new_moments
