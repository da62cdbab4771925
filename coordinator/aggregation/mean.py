"""The mean delta of a round: weighted by examples, and taken for each slice over exactly the devices that trained it.

Memory is O(slices), whatever the number of devices: deltas are read one at a time, in the order of their
slots, and summed in float64. So the order in which results arrived cannot show, not even in the last bit.

Devices that take more local steps pull the mean towards their own optimum. FedNova (Wang et al. 2020, "Tackling the
Objective Inconsistency Problem", arXiv 2007.07481) divides each delta by its steps and multiplies the mean by the mean
number of steps. With examples n, deltas D and steps s::

    mean = (sum n D / s) / (sum n) * (sum n s) / (sum n)

With s = 1 throughout this is the plain mean (sum n D) / (sum n), to the last bit.

Where devices found their gradients in unlike ways, n is divided by the variance factor that a delta's tensor states
(:mod:`coordinator.rounds.stated_variance`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from coordinator.aggregation.server_optimizers import DoubleArray, Moments, step
from coordinator.config import ServerOptimizers
from edge_runtime.package.slices import FloatArray, Values


@dataclass(frozen=True)
class Contribution:
    """One device's delta.

    Attributes:
        examples: examples behind the delta: its weight in the mean.
        delta: values after the task minus values before it, by flat name.
        steps: local steps by which the delta is divided; 1 leaves it as it is.
        slot: slot of the round that the device held.
        variance: how many times the variance of an exact gradient a tensor of the delta has, by flat name; 1 for those
            that are not named.
        line: slope and curvature of the loss along the server's last step; None if the device did not measure them.
    """

    examples: int
    delta: Mapping[str, FloatArray | DoubleArray]
    steps: int = 1
    slot: int = 0
    variance: Mapping[str, float] = field(default_factory=dict)
    line: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sum:
    """What came in for one tensor.

    Attributes:
        total: sum of n D / s.
        examples: sum of n, each divided by its variance factor.
        steps: sum of n s, likewise.
    """

    total: DoubleArray
    examples: float
    steps: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total, self.examples + other.examples, self.steps + other.steps)

    @property
    def mean(self) -> DoubleArray:
        """The mean delta."""
        return self.total / self.examples * (self.steps / self.examples)


Sums = Mapping[str, Sum]


def add(sums: dict[str, Sum], contribution: Contribution) -> None:
    """Add a contribution to sums, in place; one without examples or steps weighs nothing."""
    examples, steps = contribution.examples, contribution.steps
    if examples == 0 or steps == 0:
        return
    for name, delta in contribution.delta.items():
        weight = examples / contribution.variance.get(name, 1.0)
        more = Sum(delta.astype(np.float64) * weight / steps, weight, weight * steps)
        sums[name] = sums[name] + more if name in sums else more


def mean_delta(contributions: Iterable[Contribution]) -> dict[str, DoubleArray]:
    """The mean delta of each tensor over the devices that sent it.

    Args:
        contributions: contributions of a round, in the order of their slots; consumed one at a time.

    Returns:
        float64 means by flat name; a tensor that nobody trained on at least one example is missing.
    """
    sums: dict[str, Sum] = {}
    for contribution in contributions:
        add(sums, contribution)
    return means(sums)


def merged(first: Sums, second: Sums) -> dict[str, Sum]:
    """The sums of two halves together."""
    both = dict(first)
    for name, each in second.items():
        both[name] = both[name] + each if name in both else each
    return both


def means(sums: Sums) -> dict[str, DoubleArray]:
    """The mean of each sum."""
    return {name: each.mean for name, each in sums.items()}


def apply_deltas(
    values: Values,
    moments: Mapping[str, Moments],
    deltas: Mapping[str, DoubleArray],
    *,
    head: frozenset[str],
    optimizers: ServerOptimizers,
    rate_share: float = 1.0,
    slice_rate: float | None = None,
) -> tuple[Values, dict[str, Moments]]:
    """One server step on every tensor that has a delta; the others keep values and optimiser state.

    Args:
        values: current values of all slices.
        moments: optimiser state by flat name; a missing entry is the initial state.
        deltas: mean deltas by flat name.
        head: flat names of the head's tensors.
        optimizers: the run's optimisers for the slices and for the head.
        rate_share: share of the optimisers' rates that this round takes.
        slice_rate: the slices' rate, where it sets itself; None takes their optimiser's.

    Returns:
        new values and new optimiser state.
    """
    new_values, new_moments = dict(values), dict(moments)
    for name in sorted(deltas):
        config = optimizers.head if name in head else optimizers.slices
        own = slice_rate if name not in head else None
        config = replace(config, rate=(config.number if own is None else own) * rate_share)
        before = moments.get(name) or Moments.initial(values[name].shape, config)
        new_values[name], new_moments[name] = step(values[name], deltas[name], before, config)
    return new_values, new_moments
