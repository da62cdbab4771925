"""What one device can do to a round is bounded: its norm is compared with the others', and means may be robust.

A delta's size is the root mean square of its entries for each local step, taken for the slices and for the head apart:
so devices that train different slices, or more steps, can be compared. One that exceeds a limit times the median of the
round is left out (norm bounding; Sun et al. 2019, "Can You Really Backdoor Federated Learning?", arXiv 1911.07963).
Where fewer than three can be compared, the median of the round before stands in; without one, the smaller of two does.

Robust means on request, over the devices that trained a tensor, each counting the same (Yin et al. 2018,
"Byzantine-Robust Distributed Learning", arXiv 1803.01498): the median of each entry, or its mean without the largest
and smallest share. ``clipped`` keeps the weighted mean and scales deltas down to the median's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from coordinator.aggregation.mean import Contribution
from coordinator.config import RunConfig

#: Sizes of a delta, or of a round's median, by group: ``slices`` and ``head``.
Sizes = Mapping[str, float]
#: Fewest sizes whose median is believed.
ENOUGH = 3
#: A delta of this size is no training, whatever others do: squares of larger ones would leave float64's comfort.
ABSURD = 1e12


def sizes(contribution: Contribution, steps: int, heads: frozenset[str]) -> dict[str, float]:
    """Root mean square of a delta's entries for each of its local steps, by group; infinite if not finite.

    Args:
        contribution: a device's delta.
        steps: local steps that the device applied.
        heads: flat names of the head's tensors.
    """
    squares: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, delta in contribution.delta.items():
        group = "head" if name in heads else "slices"
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.square(delta, dtype=np.float64).sum())
        squares[group] = squares.get(group, 0.0) + square
        entries[group] = entries.get(group, 0) + delta.size
    found = {}
    for group, square in squares.items():
        size = math.sqrt(square / max(1, entries[group])) if math.isfinite(square) else math.inf
        found[group] = size / max(1, steps)
    return found


def medians(found: Sequence[Sizes], earlier: Sizes) -> dict[str, float]:
    """The size that deltas of a round are compared with, by group; a group without one cannot be compared.

    Deltas of zeros say nothing of size and are passed over. Of an even number the lower of the middle two is taken, so
    that one large delta cannot raise what it is compared with.

    Args:
        found: sizes of the round's deltas.
        earlier: what the round before was compared with.
    """
    medians = {}
    for group in sorted({group for each in found for group in each}):
        ordered = sorted(each[group] for each in found if 0 < each.get(group, 0.0) < math.inf)
        if len(ordered) < ENOUGH and group in earlier:
            medians[group] = earlier[group]
        elif len(ordered) > 1:
            medians[group] = ordered[(len(ordered) - 1) // 2]
    return medians


def score(found: Sizes, medians: Sizes) -> float:
    """How many times a delta exceeds what it is compared with, in the group where it does most; 0 if it cannot be."""
    if any(size > ABSURD for size in found.values()):
        return math.inf
    return max((size / medians[group] for group, size in found.items() if medians.get(group)), default=0.0)


def bounded(
    contributions: Iterable[tuple[Contribution, Sizes]],
    medians: Sizes,
    heads: frozenset[str],
    config: RunConfig,
) -> Iterator[Contribution]:
    """Contributions as the run's ``robust_mean`` has them enter the mean; with ``none`` they are what they were.

    Args:
        contributions: contributions of a round with their sizes, in the order of their slots.
        medians: sizes that they are compared with.
        heads: flat names of the head's tensors.
        config: configuration of the run.
    """
    if config.robust_mean in ("trimmed", "median"):
        yield from _centre([contribution for contribution, _ in contributions], config)
        return
    for contribution, found in contributions:
        yield (
            _clipped(contribution, found, medians, heads) if config.robust_mean == "clipped" else contribution
        )


def _clipped(contribution: Contribution, found: Sizes, medians: Sizes, heads: frozenset[str]) -> Contribution:
    """A contribution no larger than the median in either group."""
    factors = {
        group: medians[group] / size for group, size in found.items() if size > medians.get(group, math.inf)
    }
    if not factors:
        return contribution
    delta = {}
    for name, array in contribution.delta.items():
        factor = factors.get("head" if name in heads else "slices")
        delta[name] = array if factor is None else array.astype(np.float64) * factor
    return replace(contribution, delta=delta)


def _centre(contributions: list[Contribution], config: RunConfig) -> Iterator[Contribution]:
    """One contribution that stands for all: the centre of each entry. All deltas are in memory for it."""
    weighing = [each for each in contributions if each.examples and each.steps]
    delta = {}
    for name in sorted({name for each in weighing for name in each.delta}):
        column = np.sort(
            np.stack([each.delta[name].astype(np.float64) for each in weighing if name in each.delta]), axis=0
        )
        cut = (len(column) - 1) // 2
        if config.robust_mean == "trimmed":
            cut = min(cut, math.ceil(config.trim_share * len(column)))
        delta[name] = column[cut : len(column) - cut].mean(axis=0)
    if delta:
        yield Contribution(1, delta, slot=weighing[0].slot)
