"""Rows of ``masked_rounds`` and ``masked_answers``: how far a masked round is, and what its devices answered.

They live as long as the round is open.
"""

from __future__ import annotations

from typing import Literal

from coordinator.storage.connection import Connection

#: What is waited for; ``keys`` come with results, while a round collects.
Stage = Literal["keys", "shares", "vector", "reveal"]


def stage_of(connection: Connection, run_id: str, number: int) -> tuple[Stage, float] | None:
    """What a round waits for, and until when; None before it closes."""
    row = connection.execute(
        "SELECT stage, due_s FROM masked_rounds WHERE run_id = ? AND round = ?", (run_id, number)
    ).fetchone()
    return None if row is None else (row["stage"], float(row["due_s"]))


def set_stage(connection: Connection, run_id: str, number: int, stage: Stage, *, due_s: float) -> None:
    """Let a round wait for the next answers."""
    connection.execute(
        "INSERT INTO masked_rounds VALUES (?, ?, ?, ?) ON CONFLICT (run_id, round)"
        " DO UPDATE SET stage = excluded.stage, due_s = excluded.due_s",
        (run_id, number, stage, due_s),
    )


def extend(connection: Connection, run_id: str, until_s: float) -> None:
    """Give what a run's open round waits for until this moment at least."""
    connection.execute(
        "UPDATE masked_rounds SET due_s = CASE WHEN due_s > ? THEN due_s ELSE ? END WHERE run_id = ?",
        (until_s, until_s, run_id),
    )


def add(connection: Connection, task_id: str, stage: Stage, data: bytes) -> None:
    """Store an answer; there is none of this stage yet."""
    connection.execute("INSERT INTO masked_answers VALUES (?, ?, ?)", (task_id, stage, data))


def find(connection: Connection, task_id: str, stage: Stage) -> bytes | None:
    """An answer; None if it has not come."""
    row = connection.execute(
        "SELECT data FROM masked_answers WHERE task_id = ? AND stage = ?", (task_id, stage)
    ).fetchone()
    return None if row is None else bytes(row["data"])


def of_round(connection: Connection, run_id: str, number: int, stage: Stage) -> dict[int, bytes]:
    """All answers of a round to one stage, by slot, in order."""
    rows = connection.execute(
        "SELECT slot, data FROM masked_answers JOIN tasks USING (task_id)"
        " WHERE run_id = ? AND round = ? AND stage = ? AND state = 'counted' ORDER BY slot",
        (run_id, number, stage),
    )
    return {int(row["slot"]): bytes(row["data"]) for row in rows}


def identities(connection: Connection, run_id: str, number: int) -> dict[int, tuple[str, str]]:
    """Task and enrolled public key of each device whose keys count, by slot."""
    rows = connection.execute(
        "SELECT slot, task_id, public_key FROM tasks JOIN devices USING (device_id)"
        " WHERE run_id = ? AND round = ? AND state = 'counted'",
        (run_id, number),
    )
    return {int(row["slot"]): (str(row["task_id"]), str(row["public_key"])) for row in rows}


def vectors(connection: Connection) -> set[str]:
    """Digests of the private blobs of all masked contributions that wait for others."""
    rows = connection.execute("SELECT data FROM masked_answers WHERE stage = 'vector'")
    return {bytes(row["data"]).decode() for row in rows}


def forget(connection: Connection, run_id: str) -> set[str]:
    """Remove all that devices of a run's closed round answered; digests of the blobs that nobody needs any more."""
    before = vectors(connection)
    connection.execute("DELETE FROM masked_rounds WHERE run_id = ?", (run_id,))
    connection.execute(
        "DELETE FROM masked_answers WHERE task_id IN (SELECT task_id FROM tasks WHERE run_id = ?)", (run_id,)
    )
    return before - vectors(connection)


def note_bytes(connection: Connection, task_id: str, count: int) -> None:
    """Remember the size of a task's masked contribution."""
    connection.execute("UPDATE results SET change_bytes = ? WHERE task_id = ?", (count, task_id))
