"""What has changed of a device's rows since it handed in sums of them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data.examples import Examples
from edge_runtime.errors import DataError
from edge_runtime.protocol.messages import MOST_PARTS
from edge_runtime.training.handed_in import (
    MOST_SUMS_BYTES,
    Record,
    must_begin_anew,
    row_digests,
    since,
)

SMALL_ROWS = st.lists(st.integers(0, 5), max_size=12)


def digests(rows: list[int]) -> list[bytes]:
    """Digests of rows of one token each, all of one label."""
    return row_digests(Examples([[row] for row in rows], [0] * len(rows), 0, 8), b"k")


@given(before=SMALL_ROWS, now=SMALL_ROWS)
def test_rows_handed_in_and_to_hand_in_are_the_present_ones(before: list[int], now: list[int]) -> None:
    """Counting doubles, what stands and what is added are the present rows; it stands only if none of it is gone."""
    changed = since(Record((), b"".join(digests(before))), digests(now))
    added = [now[position] for position in changed.positions]
    assert Counter(added) + Counter(before if changed.stands else []) == Counter(now)
    assert changed.stands == (not Counter(before) - Counter(now))


def test_a_device_without_a_record_hands_in_all_rows() -> None:
    """All rows, and nothing that could stand."""
    changed = since(None, digests([1, 2]))
    assert (changed.positions, changed.stands) == ((0, 1), False)


def test_a_digest_is_of_tokens_and_label_under_the_device_s_key() -> None:
    """Another label, other tokens, tokens that run together otherwise, or another key give another digest."""
    ids, labels = [[1, 2], [1, 2], [12], [1], [1, 2]], [0, 1, 0, 2, 0]
    made = row_digests(Examples(ids, labels, 0, 8), b"k")
    assert made[0] == made[4]
    assert len(set(made)) == 4
    assert not set(made) & set(row_digests(Examples(ids, labels, 0, 8), b"other"))


@pytest.mark.parametrize("data", [b"", b"\xc1", Record((), b"123").encode(), b"x" * 100])
def test_a_damaged_record_is_told_with_a_way_out(data: bytes) -> None:
    """Bytes that are no record say what is lost and what helps."""
    with pytest.raises(DataError, match="without continue_from"):
        Record.decode(data)


def test_parts_leave_room_to_take_all_of_them_off() -> None:
    """A further part is made only while all parts and whole sums in their place fit one result."""
    assert not must_begin_anew(1, 10, 10, MOST_SUMS_BYTES - 20)
    assert must_begin_anew(1, 10, 11, MOST_SUMS_BYTES - 20)
    assert must_begin_anew(MOST_PARTS, 0, 0, 0)
