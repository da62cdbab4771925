"""What one device can do to a round is bounded: its size is compared with the others', and means may be robust.

A delta's size is the root mean square of its entries for each local step, taken for each slice. Devices that took more
steps can so be compared, and devices that trained other slices are not: slices differ by a hundred times. Where three
devices or more trained a slice, one that exceeds a limit times their median is left out (norm bounding; Sun et al.
2019, "Can You Really Backdoor Federated Learning?", arXiv 1911.07963). Where there are fewer, nobody can say who is
right: then :data:`LENIENCE` times the size that the slice had in an earlier round, or that other slices have, is it.

Robust means on request, over the devices that trained a tensor, each counting the same (Yin et al. 2018,
"Byzantine-Robust Distributed Learning", arXiv 1803.01498): the median of each entry, or its mean without the largest
and smallest share. ``clipped`` keeps the weighted mean and scales deltas down to the median's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coordinator.aggregation.mean import Contribution
from coordinator.config import RunConfig

#: Sizes by slice.
Sizes = Mapping[str, float]
#: Fewest sizes whose median is believed.
ENOUGH = 3
#: How much larger a slice may be than what is no more than a hint of its size.
LENIENCE = 100.0
#: A delta of this size is no training, whatever others do: squares of larger ones would leave float64's comfort.
ABSURD = 1e12


@dataclass(frozen=True)
class Yardsticks:
    """What a round's deltas are compared with.

    Attributes:
        medians: the median size of each slice that enough devices trained.
        hints: what stands in for it where they did not.
    """

    medians: Sizes
    hints: Sizes


def sizes(contribution: Contribution, steps: int) -> dict[str, float]:
    """Root mean square of a delta's entries for each of its local steps, by slice; infinite if not finite.

    Args:
        contribution: a device's delta.
        steps: local steps that the device applied.
    """
    squares: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, delta in contribution.delta.items():
        of = _slice(name)
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.square(delta, dtype=np.float64).sum())
        squares[of] = squares.get(of, 0.0) + square
        entries[of] = entries.get(of, 0) + delta.size
    found = {}
    for of, square in squares.items():
        size = math.sqrt(square / max(1, entries[of])) if math.isfinite(square) else math.inf
        found[of] = size / max(1, steps)
    return found


def lower_median(found: Iterable[float]) -> float | None:
    """The lower of the middle two, so that one large size cannot raise what it is compared with; None of nothing.

    Zeros say nothing of size and are passed over, as are infinities.
    """
    ordered = sorted(size for size in found if 0 < size < math.inf)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def yardsticks(found: Sequence[Sizes], earlier: Sizes) -> Yardsticks:
    """What the deltas of a round are compared with.

    Args:
        found: sizes of the round's deltas.
        earlier: sizes that slices had in earlier rounds.
    """
    by_slice: dict[str, list[float]] = {}
    for each in found:
        for of, size in each.items():
            by_slice.setdefault(of, []).append(size)
    middles = {of: lower_median(measured) for of, measured in by_slice.items()}
    medians, hints = {}, {}
    for of, measured in by_slice.items():
        middle = middles[of]
        if middle is not None and sum(0 < size < math.inf for size in measured) >= ENOUGH:
            medians[of] = middle
            continue
        others = [
            size for other, sizes in by_slice.items() for size in sizes if other != of or len(sizes) > 1
        ]
        hint = earlier.get(of) or lower_median(others)
        if hint is not None:
            hints[of] = hint
    return Yardsticks(medians, hints)


def score(found: Sizes, yardsticks: Yardsticks) -> float:
    """How many times a delta exceeds what it is compared with, in the slice where it does most; 0 if it cannot be."""
    if any(size > ABSURD for size in found.values()):
        return math.inf
    against = {**{of: LENIENCE * hint for of, hint in yardsticks.hints.items()}, **yardsticks.medians}
    return max((size / against[of] for of, size in found.items() if of in against), default=0.0)


def bounded(
    contributions: Iterable[tuple[Contribution, Sizes]], medians: Sizes, config: RunConfig
) -> Iterator[Contribution]:
    """Contributions as the run's ``robust_mean`` has them enter the mean; with ``none`` they are what they were.

    Args:
        contributions: contributions of a round with their sizes, in the order of their slots.
        medians: median sizes of the slices that enough devices trained; only these can be clipped.
        config: configuration of the run.
    """
    if config.robust_mean in ("trimmed", "median"):
        yield from _centre([contribution for contribution, _ in contributions], config)
        return
    for contribution, found in contributions:
        yield (_clipped(contribution, found, medians) if config.robust_mean == "clipped" else contribution)


def _clipped(contribution: Contribution, found: Sizes, medians: Sizes) -> Contribution:
    """A contribution no larger than the median in any slice."""
    factors = {of: medians[of] / size for of, size in found.items() if size > medians.get(of, math.inf)}
    if not factors:
        return contribution
    delta = {}
    for name, array in contribution.delta.items():
        factor = factors.get(_slice(name))
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


def _slice(name: str) -> str:
    """The slice that a tensor belongs to."""
    return name.partition("/")[0]
