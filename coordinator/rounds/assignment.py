"""Which slices each place of a round trains: Spry's cyclic split, made total.

Spry (Panchal et al. 2024, "Thinking Forward") deals the trainable layers to the clients in turn. Here the
deal also covers the cases it leaves open: more places than slices, fewer, and none; and it moves on by one
place a round, so that no device class keeps the same slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Split = Literal["cyclic", "whole"]


def deal(
    slices: Sequence[str],
    heads: Sequence[str],
    places: int,
    round_number: int,
    *,
    split: Split = "cyclic",
    head_split: bool = False,
) -> list[tuple[str, ...]]:
    """What each place of a round trains, the head included.

    Spry's text gives the head to every place; its released code deals it as one more chunk, the last in order
    (``head_split``). ``whole`` deals nothing out: FedAvg, FedYogi and FedFGD without a split.

    Args:
        slices: names in the package's order, without the head. heads: the head's name, or nothing.
        places: number of places, at least 1. round_number: from 0.
        split, head_split: of the run's configuration.

    Returns:
        one tuple of names for each place, in the package's order with the head last.
    """
    if split == "whole":
        return [(*slices, *heads)] * places
    if head_split:
        return assign((*slices, *heads), places, round_number)
    return [(*names, *heads) for names in assign(slices, places, round_number)]


def assign(slices: Sequence[str], places: int, round_number: int) -> list[tuple[str, ...]]:
    """Deal slices to the places of a round.

    With at most as many places as slices, slice ``i`` goes to place ``(i + round) mod places``; with
    more places, place ``j`` trains slice ``((j - round) mod places) mod S`` of the ``S``
    slices, so that the places share them as evenly as can be. Every slice is covered, every place has work
    (unless there are no slices), and both depend on nothing but the three numbers.

    Args:
        slices: names in the package's order, without the head.
        places: number of places, at least 1.
        round_number: from 0.

    Returns:
        one tuple of names for each place, in the package's order.
    """
    if places < 1:
        raise ValueError("a round has at least one place")
    count = len(slices)
    if count == 0:
        return [()] * places
    if places > count:
        return [(slices[(place - round_number) % places % count],) for place in range(places)]
    dealt: list[list[str]] = [[] for _ in range(places)]
    for index, name in enumerate(slices):
        dealt[(index + round_number) % places].append(name)
    return [tuple(names) for names in dealt]
