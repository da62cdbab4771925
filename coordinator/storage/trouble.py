"""Trouble that passes: that of any machine, a database locked or without room, and a server that does not answer."""

from __future__ import annotations

import sqlite3

from edge_runtime.trouble import passing_trouble

#: Primary result codes of SQLite. What says that the file is damaged or the statement wrong is not among them.
PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)
PRIMARY_BITS = 0xFF
#: Longest words of a server in a message.
MOST_WORDS = 300


class StoreAwayError(Exception):
    """A store on another machine does not answer, or not as it should; what was begun there counts as not done."""


def away(what: str, error: BaseException) -> StoreAwayError:
    """What to raise where a store fails that another machine serves; its own words in one line."""
    return StoreAwayError(f"{what}: {' '.join(str(error).split())[:MOST_WORDS]}")


def trouble_of(error: BaseException) -> str | None:
    """Words for passing trouble behind an error; None if it is something else, which waiting does not cure."""
    if isinstance(error, StoreAwayError):
        return str(error)
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return str(error) if code is not None and code & PRIMARY_BITS in PASSING else None
    return passing_trouble(error)
