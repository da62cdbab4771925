"""What the database raises: trouble that passes, or something that waiting does not cure."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.storage.trouble import trouble_of


def test_errors_of_sqlite_are_told_apart(tmp_path: Path) -> None:
    """A lock and a full disk pass; a wrong statement, a broken rule and a damaged file do not."""
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=0)
    connection.execute("CREATE TABLE t (x PRIMARY KEY)")
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError) as locked:
        other.execute("BEGIN IMMEDIATE")
    connection.execute("ROLLBACK")
    connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError) as twice:
        connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.OperationalError) as wrong:
        connection.execute("SELECT y FROM t")
    assert [trouble_of(each.value) is not None for each in (locked, twice, wrong)] == [True, False, False]
    other.close()
    connection.close()
