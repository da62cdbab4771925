"""Rows of ``set_aside``: devices that a run does not ask any more, and why."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class SetAsideRow:
    """A device that a run set aside.

    Attributes:
        device_name: name of the device.
        at_s: moment when it was set aside.
        reason: what it failed for.
        setup: what the device said of its setup then; where it says something else, it may be asked again.
    """

    device_name: str
    at_s: float
    reason: str
    setup: str


def add(connection: Connection, run_id: str, device_id: str, *, at_s: float, reason: str, setup: str) -> None:
    """Set a device aside; one that is already keeps its first reason."""
    connection.execute(
        "INSERT INTO set_aside VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (run_id, device_id, at_s, reason, setup),
    )


def find(connection: Connection, run_id: str, device_id: str) -> SetAsideRow | None:
    """Why a run set a device aside; None if it did not."""
    row = connection.execute(
        "SELECT name AS device_name, at_s, reason, set_aside.setup FROM set_aside JOIN devices USING (device_id)"
        " WHERE run_id = ? AND device_id = ?",
        (run_id, device_id),
    ).fetchone()
    return None if row is None else SetAsideRow(**row)


def of_run(connection: Connection, run_id: str) -> list[SetAsideRow]:
    """The devices that a run set aside, by name."""
    rows = connection.execute(
        "SELECT name AS device_name, at_s, reason, set_aside.setup FROM set_aside JOIN devices USING (device_id)"
        " WHERE run_id = ? AND revoked_s IS NULL ORDER BY name",
        (run_id,),
    )
    return [SetAsideRow(**row) for row in rows]


def reasons(connection: Connection, run_id: str) -> dict[str, str]:
    """Why a run set devices aside, by their ids."""
    rows = connection.execute("SELECT device_id, reason FROM set_aside WHERE run_id = ?", (run_id,))
    return {str(row["device_id"]): str(row["reason"]) for row in rows}


def remove(connection: Connection, run_id: str, device_id: str) -> bool:
    """Let a run ask a device again; False if it had not set it aside."""
    removed = connection.execute(
        "DELETE FROM set_aside WHERE run_id = ? AND device_id = ?", (run_id, device_id)
    )
    return removed.rowcount > 0
