"""LoRA's ranks averaged each by itself, over the devices that held it: ``rank_mode`` other than ``fixed``.

A device of b ranks says nothing of those beyond (DyLoRA, Valipour et al. 2023, trains nested ranks; that devices of a
fleet hold as many as fit is our own use of it). So each row of A and column of B enters the mean as a tensor of its
own: a mean over devices that lack it would pull it to zero. The mean delta of a rank that nobody held is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.server_optimizers import DoubleArray
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.ranks import rank_axes
from edge_runtime.package.slices import FloatArray, Values, key

#: Stands between a tensor's flat name and the number of a rank; no identifier has it.
MARK = "#"


def by_rank(contributions: Iterable[Contribution], specs: Sequence[SliceSpec]) -> Iterable[Contribution]:
    """Each contribution with one delta for each rank in place of that of a tensor.

    Args:
        contributions: contributions of a round; consumed one at a time.
        specs: all slices of the package.
    """
    axes = _axes(specs)
    for contribution in contributions:
        delta: dict[str, FloatArray | DoubleArray] = {}
        variance = dict(contribution.variance)
        for name, array in contribution.delta.items():
            if name not in axes:
                delta[name] = array
                continue
            for rank, part in enumerate(np.moveaxis(array, axes[name], 0)):
                delta[f"{name}{MARK}{rank}"] = part
                if name in variance:
                    variance[f"{name}{MARK}{rank}"] = variance[name]
        yield replace(contribution, delta=delta, variance=variance)


def joined_ranks(
    deltas: Mapping[str, DoubleArray], values: Values, specs: Sequence[SliceSpec]
) -> dict[str, DoubleArray]:
    """Mean deltas of whole tensors, of those of their ranks; zero for a rank that nobody held.

    Args:
        deltas: mean deltas of contributions that went through :func:`by_rank`, or through nothing.
        values: slice values that the round's tasks came with.
        specs: all slices of the package.
    """
    axes = _axes(specs)
    result = {name: delta for name, delta in deltas.items() if MARK not in name}
    for name, delta in deltas.items():
        if MARK in name:
            whole, _, rank = name.partition(MARK)
            joined = result.setdefault(whole, np.zeros(values[whole].shape))
            np.moveaxis(joined, axes[whole], 0)[int(rank)] = delta
    return result


def _axes(specs: Sequence[SliceSpec]) -> dict[str, int]:
    return {key(spec.name, tensor): axis for spec in specs for tensor, axis in rank_axes(spec).items()}
