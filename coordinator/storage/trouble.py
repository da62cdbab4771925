"""Trouble of the coordinator's machine that passes: that of any machine, and a database locked or without room."""

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


def trouble_of(error: BaseException) -> str | None:
    """Words for passing trouble behind an error; None if it is something else, which waiting does not cure."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return str(error) if code is not None and code & PRIMARY_BITS in PASSING else None
    return passing_trouble(error)
