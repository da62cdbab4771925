"""Rows of ``protecting_devices``: which devices know how to clip, to add noise and to mask what they contribute."""

from __future__ import annotations

from coordinator.storage.connection import Connection


def note(connection: Connection, device_id: str, *, protects: bool) -> None:
    """Remember what a device said of itself."""
    if protects:
        connection.execute("INSERT INTO protecting_devices VALUES (?) ON CONFLICT DO NOTHING", (device_id,))
    else:
        connection.execute("DELETE FROM protecting_devices WHERE device_id = ?", (device_id,))


def all_devices(connection: Connection) -> set[str]:
    """Ids of all that do."""
    return {str(row[0]) for row in connection.execute("SELECT device_id FROM protecting_devices")}
