"""Transactions and migrations on real database files."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator import migrations
from coordinator.storage import Storage, apply_migrations, pending_migrations
from edge_runtime.errors import ConfigError


def connect(path: Path) -> sqlite3.Connection:
    """A bare connection, as Storage makes it."""
    return sqlite3.connect(path, isolation_level=None)


def test_migrations_run_once_in_order(tmp_path: Path) -> None:
    """A fresh file gets every migration; a second opening finds nothing to do."""
    connection = connect(tmp_path / "db")
    assert apply_migrations(connection) == [step.__name__ for step in migrations.ALL]
    assert apply_migrations(connection) == []
    assert pending_migrations(connection) == []
    connection.close()


def test_asking_writes_nothing(tmp_path: Path) -> None:
    """Asking what is pending leaves an empty database empty."""
    connection = connect(tmp_path / "db")
    assert pending_migrations(connection) == list(migrations.ALL)
    assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    connection.close()


def test_failed_migration_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that fails half-way is undone whole, those before it stay, and it runs again next time."""

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise sqlite3.OperationalError("power cut")

    monkeypatch.setattr(migrations, "ALL", (*migrations.ALL, broken))
    connection = connect(tmp_path / "db")
    with pytest.raises(sqlite3.OperationalError):
        apply_migrations(connection)
    assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchone() is None
    assert pending_migrations(connection) == [broken]
    connection.close()


def test_newer_database_is_refused(tmp_path: Path) -> None:
    """A database with a migration this program does not know is refused with advice."""
    path = tmp_path / "db"
    Storage(path).close()
    connection = connect(path)
    connection.execute("INSERT INTO migrations VALUES ('from_the_future', 0)")
    connection.close()
    with pytest.raises(ConfigError, match="newer coordinator"):
        Storage(path)


def test_not_a_database(tmp_path: Path) -> None:
    """A file that is no database is refused by name."""
    path = tmp_path / "db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="cannot use the database"):
        Storage(path)


def test_transaction_is_whole_or_nothing(tmp_path: Path) -> None:
    """A block that raises leaves the database as it was."""
    storage = Storage(tmp_path / "db")
    before = storage.dump()
    with pytest.raises(RuntimeError), storage.transaction() as connection:
        connection.execute("INSERT INTO tokens VALUES ('x', 1, NULL)")
        raise RuntimeError
    assert storage.dump() == before
    storage.close()
