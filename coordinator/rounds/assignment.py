"""Which slices each slot of a round trains: Spry's cyclic split, for any number of slots and slices.

Spry (Panchal et al. 2024, "Thinking Forward") deals the trainable layers to the clients in turn. Here the deal also
covers the cases that the paper leaves open: more slots than slices, fewer, and no slices at all. It moves on by one
slot a round, so that no device class keeps the same slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Split = Literal["cyclic", "whole"]


def deal(
    slices: Sequence[str],
    heads: Sequence[str],
    slots: int,
    round_number: int,
    *,
    split: Split,
    head_split: bool = False,
) -> list[tuple[str, ...]]:
    """What each slot of a round trains, the head included.

    Args:
        slices: names of the slices in the package's order, without the head.
        heads: the head's name, or nothing.
        slots: number of slots, at least 1.
        round_number: number of the round, from 0.
        split: ``cyclic`` deals the slices to the slots in turn; ``whole`` gives all of them to every slot, as FedAvg,
            FedYogi and FedFGD do.
        head_split: whether a cyclic split deals the head as one more chunk, the last in order, as Spry's released code
            does; if not, every slot gets it, as Spry's text has it.

    Returns:
        one tuple of names for each slot, in the package's order with the head last.
    """
    if split == "whole":
        return [(*slices, *heads)] * slots
    if head_split:
        return assign((*slices, *heads), slots, round_number)
    return [(*names, *heads) for names in assign(slices, slots, round_number)]


def assign(slices: Sequence[str], slots: int, round_number: int) -> list[tuple[str, ...]]:
    """Deal slices to the slots of a round.

    With at most as many slots as slices, slice ``i`` goes to slot ``(i + round) mod slots``. With more slots, slot
    ``j`` trains slice ``((j - round) mod slots) mod S`` of the ``S`` slices, so that the slots share them as evenly as
    can be. Every slice is covered and every slot has work, unless there are no slices. The deal depends on nothing but
    the number of slices, of slots and of the round.

    Args:
        slices: names of the slices in the package's order, without the head.
        slots: number of slots, at least 1.
        round_number: number of the round, from 0.

    Returns:
        one tuple of names for each slot, in the package's order.
    """
    if slots < 1:
        raise ValueError("a round has at least one slot")
    count = len(slices)
    if count == 0:
        return [()] * slots
    if slots > count:
        return [(slices[(slot - round_number) % slots % count],) for slot in range(slots)]
    dealt: list[list[str]] = [[] for _ in range(slots)]
    for index, name in enumerate(slices):
        dealt[(index + round_number) % slots].append(name)
    return [tuple(names) for names in dealt]
