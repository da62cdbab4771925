"""Rows of ``events``: what operators want to know, in the order in which it happened."""

from __future__ import annotations

from coordinator.storage.connection import Connection, Row


def add(
    connection: Connection,
    *,
    at_s: float,
    run_id: str | None,
    number: int | None,
    device_name: str | None,
    task_id: str | None,
    code: str,
    message: str,
) -> None:
    """Append an event."""
    connection.execute(
        "INSERT INTO events (at_s, run_id, round, device, task_id, code, message)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (at_s, run_id, number, device_name, task_id, code, message),
    )


def of_run(connection: Connection, run_id: str, *, after: int, limit: int) -> list[Row]:
    """Events of a run, and those of no run, oldest first.

    Args:
        connection: connection to the database.
        run_id: id of the run.
        after: id that all events lie above.
        limit: most events.

    Returns:
        rows of event_id, at_s, round, device, task_id, code and message.
    """
    return connection.execute(
        "SELECT event_id, at_s, round, device, task_id, code, message FROM events"
        " WHERE (run_id = ? OR run_id IS NULL) AND event_id > ? ORDER BY event_id LIMIT ?",
        (run_id, after, limit),
    ).fetchall()


def was_recorded(connection: Connection, *, run_id: str, device_name: str, code: str, message: str) -> bool:
    """Whether a run has this very event of a device already."""
    row = connection.execute(
        "SELECT 1 FROM events WHERE run_id = ? AND device = ? AND code = ? AND message = ?",
        (run_id, device_name, code, message),
    ).fetchone()
    return row is not None


def forget_oldest(connection: Connection, *, kept: int) -> int:
    """Forget all events but so many of the newest; returns how many went."""
    gone = connection.execute(
        "DELETE FROM events WHERE event_id <= (SELECT max(event_id) FROM events) - ?", (kept,)
    )
    return gone.rowcount
