"""What every database of a coordinator must do, on real ones: a file of SQLite and a PostgreSQL server."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.storage import device_rows, token_rows
from coordinator.storage.connection import Database
from coordinator.storage.database import Storage, savepoint
from coordinator.storage.postgres import PostgresStorage
from coordinator.storage.trouble import trouble_of
from tests.coordinator.storage.servers import (
    needs_postgres,
    shared_postgres,
)

DATABASES = ("sqlite", pytest.param("postgresql", marks=needs_postgres))


@pytest.fixture(params=DATABASES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Database]:
    """How to open an empty database of either kind, again and again."""
    if request.param == "sqlite":
        return lambda: Storage(tmp_path / "db")
    url = shared_postgres().fresh(f"t{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]}")
    return lambda: PostgresStorage(url)


def test_what_is_written_is_there_whole_or_not_at_all(opened: Callable[[], Database]) -> None:
    """A block that raises leaves nothing, a savepoint that raises leaves the rest, and another handle sees it."""
    database = opened()
    before = database.dump()
    with pytest.raises(RuntimeError), database.transaction() as connection:
        token_rows.add(connection, "a", expires_s=1.5)
        raise RuntimeError
    assert database.dump() == before
    with database.transaction() as connection:
        token_rows.add(connection, "b", expires_s=1.5)
        with pytest.raises(RuntimeError), savepoint(connection):
            token_rows.add(connection, "c", expires_s=1.5)
            raise RuntimeError
    other = opened()
    with other.reading() as connection:
        assert token_rows.find(connection, "b") == token_rows.TokenRow(1.5, None)
        assert token_rows.find(connection, "c") is None
    database.close()
    other.close()


def test_transactions_of_two_processes_take_turns(opened: Callable[[], Database]) -> None:
    """Two handles that read a number and write the next one lose none of each other's."""
    first = opened()
    with first.transaction() as connection:
        connection.execute("INSERT INTO marks VALUES ('count', 0)")
    handles = [first, opened()]

    def count(database: Database) -> None:
        for _ in range(40):
            with database.transaction() as connection:
                (row,) = connection.execute("SELECT value FROM marks WHERE name = 'count'").fetchall()
                connection.execute("UPDATE marks SET value = ? WHERE name = 'count'", (row["value"] + 1,))

    threads = [threading.Thread(target=count, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with first.reading() as connection:
        assert connection.execute("SELECT value FROM marks WHERE name = 'count'").fetchone()[0] == 80
    for handle in handles:
        handle.close()


def test_rows_are_kept_to_the_bit(opened: Callable[[], Database]) -> None:
    """Numbers, flags, texts in any alphabet and absent values come back as they went in; names are unique."""
    database = opened()
    with database.transaction() as connection:
        for name in ("b", "a", "Ä"):
            assert device_rows.add(
                connection, f"d-{name}", name=name, device_class="c", public_key="k", enrolled_s=1e9 + 1 / 3
            )
        assert not device_rows.add(
            connection, "d-2", name="a", device_class="c", public_key="k", enrolled_s=0.0
        )
        device_rows.note_check_in(
            connection,
            "d-a",
            seen_s=5.0,
            cap_bytes=1 << 40,
            floor_bytes=1,
            example_count=2,
            runtime_version="1 'x' % ?",
            setup="s",
            trains=True,
            release=0,
            not_eligible="",
        )
        device_rows.expect_live(connection, since_s=0.0, by_s=9.0)
        device_rows.expect(connection, "d-a", 7.0)
        device_rows.expect_live(connection, since_s=7.0, by_s=9.0)
        device_rows.expect_live(connection, since_s=7.0, by_s=8.0)
        assert device_rows.use_nonce(connection, "d-a", "n", expires_s=3.0)
        assert not device_rows.use_nonce(connection, "d-a", "n", expires_s=3.0)
        device_rows.revoke(connection, "d-b", revoked_s=2.0)
        assert device_rows.add(connection, "d-3", name="b", device_class="c", public_key="k", enrolled_s=0.0)
    with database.reading() as connection:
        rows = device_rows.all_devices(connection)
        assert [row["name"] for row in rows] == ["a", "b", "b", "Ä"]
        assert rows[0]["enrolled_s"] == 1e9 + 1 / 3
        assert (rows[0]["cap_bytes"], rows[0]["expected_s"], rows[0]["runtime_version"]) == (
            1 << 40,
            9.0,
            "1 'x' % ?",
        )
        assert [device.name for device in device_rows.not_set_aside(connection, "r")] == ["a"]
    with database.transaction() as connection:
        device_rows.forget_nonces(connection, 4.0)
        device_rows.forget_nonces(connection, 1.0)
        assert device_rows.nonces_forgotten_to_s(connection) == 3.0
    database.close()


def test_one_of_two_leads(opened: Callable[[], Database]) -> None:
    """A second process gets no claim; once the first is gone it does, and where it is alone it always has it."""
    database = opened()
    first = database.leader()
    assert first.claim() == 1
    if isinstance(database, PostgresStorage):
        other = opened()
        second = other.leader()
        assert second.claim() == 0
        first.close()
        with pytest.raises(Exception, match="claim") as lost, first.transaction():
            pass
        assert trouble_of(lost.value)
        assert second.claim() == 1
        assert first.claim() == 0
        second.close()
        other.close()
        assert first.claim() == 2
    with first.transaction() as connection:
        token_rows.add(connection, "t", expires_s=1.0)
    first.close()
    database.close()
