"""Events: what operators want to know. Each is stored in the transaction that made it happen."""

from __future__ import annotations

import logging

from coordinator.storage import event_rows
from coordinator.storage.connection import Connection

log = logging.getLogger("coordinator")


def record(
    connection: Connection,
    at_s: float,
    code: str,
    message: str,
    *,
    run_id: str | None = None,
    round_number: int | None = None,
    device: str | None = None,
    task_id: str | None = None,
) -> None:
    """Append an event, and log it.

    Args:
        connection: connection with a transaction under way.
        at_s: moment of the event, in seconds since 1970.
        code: word for programs; it never changes.
        message: text for people; it holds no data values.
        run_id: id of the run that it belongs to, if any.
        round_number: number of the round that it belongs to, if any.
        device: name of the device that it belongs to, if any.
        task_id: id of the task that it belongs to, if any.
    """
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
