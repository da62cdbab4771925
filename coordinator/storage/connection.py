"""What is asked of a database, whichever it is: rows modules and transactions know only this.

Statements are written once, in the SQL that SQLite (3.38) and PostgreSQL (14) share, with ``?`` for parameters:
``ON CONFLICT`` and ``RETURNING``, ``CASE`` for the larger of two numbers, numbers for yes and no, and a name for every
table of a ``FROM``. :mod:`coordinator.storage.postgres` translates what differs all the same: types of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Row(Protocol):
    """A row, by position and by name."""

    def __getitem__(self, key: Any, /) -> Any:
        """A column's value, by name or place; of a slice of places, their values."""

    def __iter__(self) -> Iterator[Any]:
        """The values, in the order of the columns."""

    def __len__(self) -> int:
        """Number of columns."""

    def keys(self) -> Iterable[str]:
        """Names of the columns."""


class Cursor(Protocol):
    """What came of a statement."""

    @property
    def rowcount(self) -> int:
        """Number of rows that it changed."""

    def fetchone(self) -> Any:
        """The next row; None behind the last one."""

    def fetchall(self) -> list[Any]:
        """All rows that are left."""

    def __iter__(self) -> Iterator[Any]:
        """The rows, one by one."""


class Connection(Protocol):
    """A connection with a transaction under way."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """Run one statement."""

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Cursor:
        """Run one statement for each set of parameters."""

    @property
    def in_transaction(self) -> bool:
        """Whether the transaction is still under way; after some errors a database has ended it itself."""


class Database(Protocol):
    """A database of the coordinator; transactions from several threads take turns."""

    def transaction(self) -> AbstractContextManager[Connection]:
        """All statements inside take effect together, or none if the block raises; no other writes meanwhile."""

    def reading(self) -> AbstractContextManager[Connection]:
        """A consistent view over several queries; writes nothing."""

    def leader(self) -> Database:
        """A handle for what one process alone may do, which must :meth:`claim` it first."""

    def claim(self) -> int:
        """Which claim this is, from 1 on, if this process alone plays the rounds now; 0 if another does.

        Nothing that is done through the handle of :meth:`leader` takes effect once the claim is lost.
        """

    def wall_s(self) -> float:
        """Seconds since 1970 by the clock that all coordinators of this database share."""

    def sizes_bytes(self) -> dict[str, int]:
        """Bytes on the disk, by what they are."""

    def dump(self) -> list[str]:
        """The whole content as text; for tests and for operators' questions."""

    def close(self) -> None:
        """Close the connection; leaving this out loses nothing."""
