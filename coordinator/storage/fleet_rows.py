"""What the dashboard asks of several tables at once: each question is bounded, however long the history is."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from edge_runtime.protocol.messages import MemoryReport

#: Newest results and events that figures by class and by reason are made of.
NEWEST_RESULTS, NEWEST_EVENTS = 2_000, 20_000


@dataclass(frozen=True)
class ClassMemory:
    """Peak memory of a result's worker, and the class of its device."""

    device_class: str
    memory: MemoryReport


@dataclass(frozen=True)
class Trouble:
    """How often something went wrong.

    Attributes:
        code: code of the event.
        count: how often it was.
        devices: how many devices it was of.
        message: what the newest of them said.
    """

    code: str
    count: int
    devices: int
    message: str


def newest_memory(connection: sqlite3.Connection) -> list[ClassMemory]:
    """Memory of the newest results, the newest first."""
    rows = connection.execute(
        "SELECT class, memory FROM (SELECT task_id, memory FROM results ORDER BY rowid DESC LIMIT ?)"
        " JOIN tasks USING (task_id) JOIN devices USING (device_id)",
        (NEWEST_RESULTS,),
    )
    return [
        ClassMemory(str(row["class"]), msgspec.json.decode(row["memory"], type=MemoryReport)) for row in rows
    ]


def troubles(
    connection: sqlite3.Connection, codes: Collection[str], *, run_id: str | None = None
) -> list[Trouble]:
    """What went wrong among the newest events, or those of a run, the most frequent first."""
    marks = ", ".join("?" * len(codes))
    where = "WHERE run_id = ? " if run_id is not None else ""
    rows = connection.execute(
        f"SELECT code, count(*) AS count, count(DISTINCT device) AS devices, message, max(event_id)"  # noqa: S608
        f" FROM (SELECT * FROM events {where}ORDER BY event_id DESC LIMIT ?) WHERE code IN ({marks})"
        " GROUP BY code ORDER BY count(*) DESC, code",
        (*([run_id] if run_id is not None else []), NEWEST_EVENTS, *codes),
    )
    return [Trouble(row["code"], row["count"], row["devices"], row["message"]) for row in rows]


def find_device(connection: sqlite3.Connection, name_or_id: str) -> sqlite3.Row | None:
    """All that is stored of a device, named by id or name; of several by one name, the one that is not revoked."""
    row: sqlite3.Row | None = connection.execute(
        "SELECT * FROM devices WHERE device_id = ? OR name = ?"
        " ORDER BY device_id = ? DESC, revoked_s IS NULL DESC, enrolled_s DESC LIMIT 1",
        (name_or_id, name_or_id, name_or_id),
    ).fetchone()
    return row


def tasks_of_device(connection: sqlite3.Connection, device_id: str, *, limit: int) -> list[sqlite3.Row]:
    """The newest tasks of a device with what came of each, newest first."""
    return connection.execute(
        "SELECT tasks.task_id, run_id, round, slot, attempt, state, reason, reserved_s, due_s, required_bytes,"
        " examples, steps_applied, mean_loss, seconds, memory, received_s, change_bytes, left_out"
        " FROM tasks LEFT JOIN results USING (task_id) WHERE device_id = ? ORDER BY reserved_s DESC LIMIT ?",
        (device_id, limit),
    ).fetchall()


def events_of_device(connection: sqlite3.Connection, name: str, *, limit: int) -> list[sqlite3.Row]:
    """The newest events of a device, newest first."""
    return connection.execute(
        "SELECT event_id, at_s, run_id, round, code, message FROM events WHERE device = ?"
        " ORDER BY event_id DESC LIMIT ?",
        (name, limit),
    ).fetchall()


def newest_events(connection: sqlite3.Connection, run_id: str, *, limit: int) -> list[sqlite3.Row]:
    """The newest events of a run, newest first."""
    return connection.execute(
        "SELECT event_id, at_s, round, device, code, message FROM events WHERE run_id = ?"
        " ORDER BY event_id DESC LIMIT ?",
        (run_id, limit),
    ).fetchall()


def train_losses(connection: sqlite3.Connection, run_id: str) -> list[tuple[int, float]]:
    """Mean loss that the devices of each committed round reported, weighted by examples, by round."""
    rows = connection.execute(
        "SELECT entered_round, sum(loss * examples) / sum(examples) FROM (SELECT coalesce(entered, round)"
        " AS entered_round, mean_loss AS loss, examples FROM tasks JOIN results USING (task_id)"
        " WHERE run_id = ? AND mean_loss IS NOT NULL AND examples > 0) JOIN rounds"
        " ON rounds.run_id = ? AND round = entered_round WHERE rounds.state = 'committed'"
        " AND rolled_back_s IS NULL GROUP BY entered_round ORDER BY entered_round",
        (run_id, run_id),
    )
    return [(int(row[0]), float(row[1])) for row in rows]


def fingerprint(connection: sqlite3.Connection) -> str:
    """A text that is another whenever something happened that pages show; check-ins alone do not change it."""
    row = connection.execute(
        "SELECT (SELECT max(event_id) FROM events), (SELECT max(rowid) FROM results),"
        " (SELECT group_concat(state || number || newest) FROM (SELECT state, count(*) AS number,"
        "  max(task_id) AS newest FROM tasks WHERE state IN ('reserved', 'working') GROUP BY state)),"
        " (SELECT group_concat(run_id || round || state) FROM rounds"
        "  WHERE state IN ('selecting', 'collecting', 'aggregating')),"
        " (SELECT count(*) FROM evaluations WHERE state != 'pending'), (SELECT max(number) FROM releases),"
        " (SELECT group_concat(state || coalesce(paused_s, '') || committed) FROM"
        "  (SELECT state, paused_s, committed FROM runs ORDER BY position DESC LIMIT 50))"
    ).fetchone()
    return repr(tuple(row))
