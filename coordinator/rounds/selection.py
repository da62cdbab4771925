"""Which devices a round asks: a seeded order over device names, and a fit of devices to places.

Names, not ids, enter the draw: ids are random, names are the operator's. So the same seed and the same
names ask the same devices in every repetition of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidate:
    """A device that may be asked; memory in bytes, as it said when it last checked in."""

    device_id: str
    name: str
    cap_bytes: int
    floor_bytes: int


def draw_order(candidates: Iterable[Candidate], seed: int, round_number: int) -> list[Candidate]:
    """All candidates in this round's random order: those at the front are asked first.

    Every order of the same names is equally likely; it depends on (seed, round, set of names) only.
    """
    by_name = sorted(candidates, key=lambda candidate: candidate.name)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, round_number])))
    return [by_name[int(index)] for index in generator.permutation(len(by_name))]


def fit(
    order: Sequence[Candidate], places: int, required_bytes: Callable[[int, Candidate], int]
) -> dict[int, Candidate]:
    """Give each place the first device in ``order`` whose cap admits it.

    Places that need most choose first, so no place stays empty that some device could have served.

    Args:
        order: the round's random order.
        places: number of places.
        required_bytes: predicted peak of a place's task on a device.

    Returns:
        place to device; a place that no free device can serve is missing.
    """
    free = list(order)
    chosen: dict[int, Candidate] = {}
    if not free:
        return chosen
    demanding_first = sorted(range(places), key=lambda place: (-required_bytes(place, free[0]), place))
    for place in demanding_first:
        for candidate in free:
            if required_bytes(place, candidate) <= candidate.cap_bytes:
                chosen[place] = candidate
                free.remove(candidate)
                break
    return dict(sorted(chosen.items()))


def substitute(
    order: Sequence[Candidate],
    place: int,
    *,
    busy: set[str],
    had_place: set[str],
    failed: set[str],
    required_bytes: Callable[[int, Candidate], int],
) -> Candidate | None:
    """The next device for a place whose device fell out.

    Args:
        order: the round's random order.
        place: the place to fill.
        busy: ids of devices that hold a place of the round, or whose result was counted.
        had_place: ids of devices that had this very place before: they never get it again.
        failed: ids of devices that lost another place of the round: asked after all others.
        required_bytes: predicted peak of a place's task on a device.
    """
    for candidate in sorted(order, key=lambda candidate: candidate.device_id in failed):
        if candidate.device_id in busy or candidate.device_id in had_place:
            continue
        if required_bytes(place, candidate) <= candidate.cap_bytes:
            return candidate
    return None
