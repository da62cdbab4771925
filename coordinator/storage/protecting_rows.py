"""Rows of ``protecting_devices``: which devices know how to clip, to add noise and to mask what they contribute."""

from __future__ import annotations

import sqlite3


def note(connection: sqlite3.Connection, device_id: str, *, protects: bool) -> None:
    """Remember what a device said of itself."""
    if protects:
        connection.execute("INSERT OR IGNORE INTO protecting_devices VALUES (?)", (device_id,))
    else:
        connection.execute("DELETE FROM protecting_devices WHERE device_id = ?", (device_id,))


def all_devices(connection: sqlite3.Connection) -> set[str]:
    """Ids of all that do."""
    return {str(row[0]) for row in connection.execute("SELECT device_id FROM protecting_devices")}
