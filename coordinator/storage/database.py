"""The coordinator's SQLite database: explicit transactions, and named migrations.

A migration is a function; its name is recorded in the very transaction that runs it, so that a crash
leaves it either done or not begun. Asking what is pending writes nothing.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.storage import migrations
from coordinator.storage.connection import Connection
from coordinator.storage.trouble import trouble_of
from edge_runtime.errors import ConfigError, ResourceError

#: What the write-ahead log is cut to once its content has reached the database.
MAX_WAL_BYTES = 16 << 20

Migration = Callable[[Connection], None]


class Storage:
    """One connection to one database file; transactions from several threads take turns.

    Args:
        path: database file, created if missing.
        durable: whether a transaction is on the disk when it ends. If not, killing the process still loses nothing, but
            a power cut may lose the last transactions; that is for simulations, which can be run again.

    Raises:
        ConfigError: the file is no such database, or was written by a newer coordinator.
        ResourceError: it cannot be opened now: it is locked, or the disk is full.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self._turn = threading.RLock()
        self._path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA busy_timeout = 5000")
            self._connection.execute(f"PRAGMA journal_size_limit = {MAX_WAL_BYTES}")
            apply_migrations(self._connection)
        except sqlite3.DatabaseError as error:
            trouble = trouble_of(error)
            if trouble is not None:
                raise ResourceError(
                    f"cannot use the database {path} now: {trouble}; make room, or end what holds it, and start again"
                ) from error
            raise ConfigError(f"cannot use the database {path}: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements inside take effect together, or none if the block raises."""
        with self._turn:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A consistent view over several queries; writes nothing."""
        with self._turn:
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._roll_back()

    def _roll_back(self) -> None:
        """End a transaction without effect; after some errors, such as a full disk, SQLite has done so itself."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def leader(self) -> Storage:
        """This very handle: the state folder's lock lets in one process alone."""
        return self

    def claim(self) -> int:
        """The first claim, and the last."""
        return 1

    def wall_s(self) -> float:
        """Seconds since 1970 by the machine's clock."""
        return time.time()

    def dump(self) -> list[str]:
        """The whole content as SQL statements; for tests and for operators' questions."""
        with self._turn:
            return list(self._connection.iterdump())

    def sizes_bytes(self) -> dict[str, int]:
        """Sizes of the database's files: itself, and the log of what it has not taken in yet."""
        files = {"database": self._path, "log": self._path.with_name(f"{self._path.name}-wal")}
        return {name: path.stat().st_size for name, path in files.items() if path.exists()}

    def close(self) -> None:
        """Close the connection; leaving this out loses nothing."""
        with self._turn:
            self._connection.close()


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """A part of a transaction that takes effect whole, or not at all if the block raises."""
    connection.execute("SAVEPOINT part")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK TO part")
            connection.execute("RELEASE part")
        raise
    connection.execute("RELEASE part")


def pending_migrations(connection: sqlite3.Connection) -> list[Migration]:
    """Migrations that have not run yet, in order; writes nothing.

    Raises:
        ConfigError: the database holds a migration this program does not know.
    """
    exists = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'migrations'").fetchone()
    rows = connection.execute("SELECT name FROM migrations") if exists else []
    return pending({str(row[0]) for row in rows})


def pending(applied: Collection[str]) -> list[Migration]:
    """Migrations that are not among those that were applied, in order.

    Raises:
        ConfigError: one was that this program does not know.
    """
    if unknown := sorted(set(applied) - {step.__name__ for step in migrations.ALL}):
        raise ConfigError(
            f"the database was written by a newer coordinator (migration {unknown[0]}); upgrade this one"
        )
    return [step for step in migrations.ALL if step.__name__ not in applied]


def apply_migrations(connection: sqlite3.Connection) -> list[str]:
    """Run the migrations that are pending, each in its own transaction, and return their names."""
    done = []
    for step in pending_migrations(connection):
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied_s REAL NOT NULL)"
            )
            step(connection)
            connection.execute("INSERT INTO migrations VALUES (?, ?)", (step.__name__, time.time()))
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        done.append(step.__name__)
    return done
