"""Rows of ``audit``: who did what, when, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class AuditRow:
    """An act.

    Attributes:
        audit_id: its number; later acts have larger ones.
        at_s: moment when it was asked for.
        who: name of the user, ``admin.token``, or empty for a stranger who tried to sign in.
        act: what was asked for.
        subject: what it was about: a run, a device, a user; empty if nothing in particular.
        outcome: ``done``, the code of a refusal, or ``begun`` where the coordinator ended before it was known.
        detail: more about it, or why it was refused.
    """

    audit_id: int
    at_s: float
    who: str
    act: str
    subject: str
    outcome: str
    detail: str


def begin(connection: Connection, *, at_s: float, who: str, act: str, subject: str) -> int:
    """Append an act that is about to be done, and return its number."""
    row = connection.execute(
        "INSERT INTO audit (at_s, who, act, subject, outcome) VALUES (?, ?, ?, ?, 'begun') RETURNING audit_id",
        (at_s, who, act, subject),
    ).fetchone()
    return int(row["audit_id"])


def end(connection: Connection, audit_id: int, *, outcome: str, detail: str) -> None:
    """Store what came of an act."""
    connection.execute(
        "UPDATE audit SET outcome = ?, detail = ? WHERE audit_id = ?", (outcome, detail, audit_id)
    )


def newest(connection: Connection, *, before: int, limit: int) -> list[AuditRow]:
    """Acts with a number below ``before``, newest first, at most ``limit``."""
    rows = connection.execute(
        "SELECT * FROM audit WHERE audit_id < ? ORDER BY audit_id DESC LIMIT ?", (before, limit)
    )
    return [AuditRow(**row) for row in rows]


def forget_strangers(connection: Connection, *, kept: int) -> None:
    """Forget all but so many of the newest acts of strangers, who could else fill the disk or push others out."""
    connection.execute(
        "DELETE FROM audit WHERE who = '' AND audit_id <= (SELECT audit_id FROM audit WHERE who = ''"
        " ORDER BY audit_id DESC LIMIT 1 OFFSET ?)",
        (kept,),
    )
