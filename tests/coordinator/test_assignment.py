"""Spry's cyclic split, made total."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.assignment import assign

NAMES = st.integers(0, 40).map(lambda count: [f"s{index}" for index in range(count)])


@given(NAMES, st.integers(1, 60), st.integers(0, 1000))
def test_total(slices: list[str], places: int, round_number: int) -> None:
    """Whatever the numbers, every slice is covered, every place has work, and no place has a slice twice."""
    dealt = assign(slices, places, round_number)
    assert len(dealt) == places
    assert {name for names in dealt for name in names} == set(slices)
    assert all(len(set(names)) == len(names) for names in dealt)
    if slices:
        assert all(dealt)


@given(NAMES.filter(bool), st.integers(1, 60), st.integers(0, 1000))
def test_even(slices: list[str], places: int, round_number: int) -> None:
    """Places differ by at most one slice, and slices by at most one place."""
    dealt = assign(slices, places, round_number)
    per_place = [len(names) for names in dealt]
    per_slice = [sum(name in names for names in dealt) for name in slices]
    assert max(per_place) - min(per_place) <= 1
    assert max(per_slice) - min(per_slice) <= 1


@given(NAMES.filter(bool), st.integers(1, 60), st.integers(0, 1000))
def test_rotates(slices: list[str], places: int, round_number: int) -> None:
    """In the next round every place has what the place before it had."""
    now, then = assign(slices, places, round_number), assign(slices, places, round_number + 1)
    assert [set(names) for names in then] == [set(names) for names in now[-1:] + now[:-1]]


def test_by_hand() -> None:
    """Slice i goes to place (i + round) mod n."""
    assert assign(["a", "b", "c", "d", "e"], 2, 0) == [("a", "c", "e"), ("b", "d")]
    assert assign(["a", "b", "c", "d", "e"], 2, 1) == [("b", "d"), ("a", "c", "e")]
    assert assign(["a", "b"], 5, 0) == [("a",), ("b",), ("a",), ("b",), ("a",)]
    assert assign([], 2, 3) == [(), ()]


def test_no_places() -> None:
    """A round without places is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one place"):
        assign(["a"], 0, 0)
