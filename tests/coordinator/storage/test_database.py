"""Transactions and migrations on real database files."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.storage import migrations
from coordinator.storage.database import Storage, apply_migrations, pending_migrations
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


def test_open_rounds_keep_their_heads(tmp_path: Path) -> None:
    """Slots of a round that was open when the head was not yet dealt name it afterwards; closed rounds stay."""
    connection = connect(tmp_path / "db")
    earlier = migrations.ALL[: migrations.ALL.index(migrations.deal_heads)]
    for migration in earlier:
        migration(connection)
    for run_id, train_head in (("with", "true"), ("without", "false")):
        connection.execute(
            "INSERT INTO runs (run_id, config, package_sha256, package_signature, state, created_s, values_sha256)"
            " VALUES (?, ?, '', '', 'running', 0, '')",
            (run_id, f'{{"train_head": {train_head}}}'),
        )
        for number, state in enumerate(("committed", "selecting")):
            connection.execute(
                "INSERT INTO rounds (run_id, round, state, opened_s, deadline_s, values_sha256)"
                " VALUES (?, ?, ?, 0, 0, '')",
                (run_id, number, state),
            )
            connection.execute("INSERT INTO slots VALUES (?, ?, 0, '[\"s0\"]')", (run_id, number))
    migrations.deal_heads(connection)
    found = connection.execute("SELECT run_id, round, slices FROM slots ORDER BY run_id, round").fetchall()
    assert [(*row,) for row in found] == [
        ("with", 0, '["s0"]'),
        ("with", 1, '["s0","head"]'),
        ("without", 0, '["s0"]'),
        ("without", 1, '["s0"]'),
    ]
    connection.close()
