"""Transactions and migrations on real database files."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.storage import migrations, result_rows, round_rows, run_rows
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


def schema(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Tables and their columns, and indexes, by name."""
    tables = [
        str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    columns = [
        (name, *map(str, row)) for name in tables for row in connection.execute(f"PRAGMA table_info({name})")
    ]
    indexes = connection.execute("SELECT 'index', name FROM sqlite_master WHERE type = 'index'")
    return sorted([*columns, *map(tuple, indexes)])


@pytest.mark.parametrize("count", range(len(migrations.ALL)))
def test_a_database_of_an_earlier_version_goes_on(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From every earlier set of migrations a file comes to the present tables, with what was in it."""
    whole = migrations.ALL
    monkeypatch.setattr(migrations, "ALL", whole[:count])
    old = Storage(tmp_path / "old")
    if count:
        with old.transaction() as connection:
            connection.execute("INSERT INTO tokens VALUES ('kept', 1, NULL)")
    old.close()
    monkeypatch.setattr(migrations, "ALL", whole)
    Storage(tmp_path / "old").close()
    Storage(tmp_path / "fresh").close()
    found = connect(tmp_path / "old")
    fresh = connect(tmp_path / "fresh")
    assert schema(found) == schema(fresh)
    assert found.execute("SELECT count(*) FROM tokens").fetchone() == (min(count, 1),)
    found.close()
    fresh.close()


def test_a_stored_database_goes_on(tmp_path: Path) -> None:
    """The file that a coordinator wrote before several could share one, in the middle of a run, is read as it was: run,
    rounds, tasks and results, with nothing lost."""
    connection = connect(tmp_path / "db")
    connection.executescript((Path(__file__).parent / "before_sharing.sql").read_text())
    before = {
        table: connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
        for table in (
            "devices",
            "runs",
            "rounds",
            "slots",
            "tasks",
            "results",
            "events",
            "checkpoints",
            "nonces",
        )
    }
    connection.close()
    storage = Storage(tmp_path / "db")
    with storage.reading() as reading:
        for table, rows in before.items():
            assert [(*row,) for row in reading.execute(f"SELECT * FROM {table}")] == rows, table  # noqa: S608
        run = run_rows.find_newest(reading)
        assert run is not None
        assert (run.state, run.committed) == ("running", 1)
        open_round = round_rows.find_open(reading, run.run_id)
        assert open_round is not None
        assert len(result_rows.counted(reading, run.run_id, open_round.round)) == 1
        assert result_rows.needed_blobs(reading) >= {
            result.change_sha256 for result in result_rows.counted(reading, run.run_id, open_round.round)
        }
    storage.close()
