"""Rows of ``shared``: what all coordinators of a database must agree on, by name."""

from __future__ import annotations

from coordinator.storage.connection import Connection


def find(connection: Connection, name: str) -> str | None:
    """What was agreed on; None if nothing was."""
    row = connection.execute("SELECT value FROM shared WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row["value"])


def agree(connection: Connection, name: str, value: str) -> str:
    """What was agreed on, which is this value if nothing was before."""
    connection.execute("INSERT INTO shared VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value))
    return find(connection, name) or value
