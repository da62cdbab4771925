"""Things operators want to know, kept in the database in the transaction that made them happen."""

from __future__ import annotations

import logging
import sqlite3

log = logging.getLogger("coordinator")


def record(
    connection: sqlite3.Connection,
    at_s: float,
    code: str,
    message: str,
    *,
    run_id: str | None = None,
    round_number: int | None = None,
    device: str | None = None,
    task_id: str | None = None,
) -> None:
    """Append an event; ``code`` is stable, ``message`` is for people and holds no data values."""
    connection.execute(
        "INSERT INTO events (at_s, run_id, round, device, task_id, code, message)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (at_s, run_id, round_number, device, task_id, code, message),
    )
    log.info(
        "event code=%s run=%s round=%s device=%s task=%s message=%r",
        code,
        run_id,
        round_number,
        device,
        task_id,
        message,
    )
