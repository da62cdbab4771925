"""Spry's cyclic split, made total."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds.assignment import assign, deal

NAMES = st.integers(0, 40).map(lambda count: [f"s{index}" for index in range(count)])


@given(NAMES, st.integers(1, 60), st.integers(0, 1000))
def test_total(slices: list[str], slots: int, round_number: int) -> None:
    """Whatever the numbers, every slice is covered, every slot has work, and no slot has a slice twice."""
    dealt = assign(slices, slots, round_number)
    assert len(dealt) == slots
    assert {name for names in dealt for name in names} == set(slices)
    assert all(len(set(names)) == len(names) for names in dealt)
    if slices:
        assert all(dealt)


@given(NAMES.filter(bool), st.integers(1, 60), st.integers(0, 1000))
def test_even(slices: list[str], slots: int, round_number: int) -> None:
    """Slots differ by at most one slice, and slices by at most one slot."""
    dealt = assign(slices, slots, round_number)
    per_place = [len(names) for names in dealt]
    per_slice = [sum(name in names for names in dealt) for name in slices]
    assert max(per_place) - min(per_place) <= 1
    assert max(per_slice) - min(per_slice) <= 1


@given(NAMES.filter(bool), st.integers(1, 60), st.integers(0, 1000))
def test_rotates(slices: list[str], slots: int, round_number: int) -> None:
    """In the next round every slot has what the slot before it had."""
    now, then = assign(slices, slots, round_number), assign(slices, slots, round_number + 1)
    assert [set(names) for names in then] == [set(names) for names in now[-1:] + now[:-1]]


def test_by_hand() -> None:
    """Slice i goes to slot (i + round) mod n."""
    assert assign(["a", "b", "c", "d", "e"], 2, 0) == [("a", "c", "e"), ("b", "d")]
    assert assign(["a", "b", "c", "d", "e"], 2, 1) == [("b", "d"), ("a", "c", "e")]
    assert assign(["a", "b"], 5, 0) == [("a",), ("b",), ("a",), ("b",), ("a",)]
    assert assign([], 2, 3) == [(), ()]


@given(NAMES, st.booleans(), st.integers(1, 60), st.integers(0, 1000), st.booleans())
def test_cyclic_deal_with_head(
    slices: list[str], has_head: bool, slots: int, round_number: int, head_split: bool
) -> None:
    """Every chunk is covered, every slot has work if there is any, and the head is last and where it was asked for."""
    heads = ["head"] * has_head
    dealt = deal(slices, heads, slots, round_number, split="cyclic", head_split=head_split)
    assert len(dealt) == slots
    assert {name for names in dealt for name in names} == {*slices, *heads}
    if slices or heads:
        assert all(dealt)
    assert all("head" not in names[:-1] for names in dealt)
    if has_head and not head_split:
        assert all(names[-1] == "head" for names in dealt)
    if has_head and head_split and slots <= len(slices) + 1:
        assert sum("head" in names for names in dealt) == 1


@given(NAMES, st.integers(1, 60), st.integers(0, 1000))
def test_whole_deals_nothing_out(slices: list[str], slots: int, round_number: int) -> None:
    """Undealt, every slot of every round trains everything."""
    assert deal(slices, ["head"], slots, round_number, split="whole") == [(*slices, "head")] * slots


def test_head_as_a_chunk_by_hand() -> None:
    """The head is the chunk after the last slice, and moves on with the rounds like one."""
    assert deal(["a", "b"], ["head"], 2, 0, split="cyclic", head_split=True) == [("a", "head"), ("b",)]
    assert deal(["a", "b"], ["head"], 2, 1, split="cyclic", head_split=True) == [("b",), ("a", "head")]
    assert deal(["a"], ["head"], 3, 0, split="cyclic", head_split=True) == [("a",), ("head",), ("a",)]


def test_no_places() -> None:
    """A round without slots is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one slot"):
        assign(["a"], 0, 0)
