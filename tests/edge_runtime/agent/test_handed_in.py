"""The sums that a device keeps: found by what a task names, bounded, and never lost before they are needed no more."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edge_runtime.agent import handed_in
from edge_runtime.agent.handed_in import HandedInSums
from edge_runtime.errors import DataError
from edge_runtime.training.handed_in import Record

ROWS = b"0123456789abcdef"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_was_handed_in_is_found_by_its_digests(tmp_path: Path) -> None:
    """Record and bytes come back after a restart, under the names that the coordinator has of them."""
    HandedInSums(tmp_path / "sums").keep((), b"first", ROWS, ())
    HandedInSums(tmp_path / "sums").keep((digest(b"first"),), b"more", ROWS * 2, (digest(b"first"),))
    kept, parts = HandedInSums(tmp_path / "sums"), (digest(b"first"), digest(b"more"))
    assert Record.decode(kept.record_path(parts).read_bytes()) == Record(parts, ROWS * 2)
    assert (kept.read(parts), kept.sizes(parts)) == ((b"first", b"more"), [5, 4])
    # The result may never be counted: what stood before is there too.
    assert Record.decode(kept.record_path(parts[:1]).read_bytes()).rows == ROWS
    assert (tmp_path / "sums").stat().st_mode & 0o777 == 0o700


def test_nothing_added_is_a_record_without_a_file(tmp_path: Path) -> None:
    """A device that took all its rows off, or had nothing new, keeps the record alone."""
    kept = HandedInSums(tmp_path / "sums")
    kept.keep((), b"", b"", ())
    assert Record.decode(kept.record_path(()).read_bytes()) == Record((), b"")


def test_sums_that_are_not_known_are_told_with_a_way_out(tmp_path: Path) -> None:
    """A device that was set up anew, or lost or damaged a file, says so and what helps."""
    kept = HandedInSums(tmp_path / "sums")
    with pytest.raises(DataError, match=r"no record of the 1 sums .* without continue_from"):
        kept.record_path((digest(b"first"),))
    kept.keep((), b"first", ROWS, ())
    (tmp_path / "sums" / digest(b"first")).write_bytes(b"other")
    with pytest.raises(DataError, match=r"damaged: .* without continue_from"):
        kept.read((digest(b"first"),))
    (tmp_path / "sums" / digest(b"first")).unlink()
    with pytest.raises(DataError, match="no record"):
        kept.record_path((digest(b"first"),))


def test_old_records_go_and_what_a_task_named_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many runs nor large sums fill the disk; what the task named and what came of it always stay."""
    monkeypatch.setattr(handed_in, "MOST_KEPT_BYTES", 1000)
    kept = HandedInSums(tmp_path / "sums")
    kept.keep((), b"named", ROWS, ())
    named = (digest(b"named"),)
    for number in range(8):
        data = bytes([number]) * 400
        kept.keep((), data, ROWS, named)
        path = kept.record_path((digest(data),))
        os.utime(path, ns=(number, number))  # file systems may have coarse clocks
        assert kept.read(named) == (b"named",)
    files = sorted(path.name for path in (tmp_path / "sums").iterdir())
    assert digest(bytes([7]) * 400) in files
    assert sum((tmp_path / "sums" / name).stat().st_size for name in files) <= 1000
    assert sum(name.endswith(".record") for name in files) <= handed_in.MOST_RECORDS
