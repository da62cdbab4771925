"""Things operators want to know, kept in the database in the transaction that made them happen."""

from __future__ import annotations

import logging
import sqlite3

from coordinator.storage import event_rows

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
    event_rows.add(
        connection,
        at_s=at_s,
        run_id=run_id,
        number=round_number,
        device_name=device,
        task_id=task_id,
        code=code,
        message=message,
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
