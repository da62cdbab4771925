"""What the dashboard asks of several tables at once: each question is bounded, however long the history is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from coordinator.storage.connection import Connection, Row
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


def newest_memory(connection: Connection) -> list[ClassMemory]:
    """Memory of the newest results, the newest first."""
    rows = connection.execute(
        "SELECT class, memory FROM (SELECT task_id, memory FROM results ORDER BY received_s DESC LIMIT ?) AS newest"
        " JOIN tasks USING (task_id) JOIN devices USING (device_id)",
        (NEWEST_RESULTS,),
    )
    return [
        ClassMemory(str(row["class"]), msgspec.json.decode(row["memory"], type=MemoryReport)) for row in rows
    ]


def troubles(connection: Connection, codes: Collection[str], *, run_id: str | None = None) -> list[Trouble]:
    """What went wrong among the newest events, or those of a run, the most frequent first."""
    marks = ", ".join("?" * len(codes))
    where = "WHERE run_id = ? " if run_id is not None else ""
    rows = connection.execute(
        "SELECT counted.code, counted.number, counted.devices, events.message FROM (SELECT code, count(*) AS number,"  # noqa: S608
        " count(DISTINCT device) AS devices, max(event_id) AS last FROM"
        f" (SELECT code, device, event_id FROM events {where}ORDER BY event_id DESC LIMIT ?) AS newest"
        f" WHERE code IN ({marks}) GROUP BY code) AS counted JOIN events ON events.event_id = counted.last"
        " ORDER BY counted.number DESC, counted.code",
        (*([run_id] if run_id is not None else []), NEWEST_EVENTS, *codes),
    )
    return [Trouble(row["code"], row["number"], row["devices"], row["message"]) for row in rows]


def find_device(connection: Connection, name_or_id: str) -> Row | None:
    """All that is stored of a device, named by id or name; of several by one name, the one that is not revoked."""
    row: Row | None = connection.execute(
        "SELECT * FROM devices WHERE device_id = ? OR name = ?"
        " ORDER BY device_id = ? DESC, revoked_s IS NULL DESC, enrolled_s DESC LIMIT 1",
        (name_or_id, name_or_id, name_or_id),
    ).fetchone()
    return row


def tasks_of_device(connection: Connection, device_id: str, *, limit: int) -> list[Row]:
    """The newest tasks of a device with what came of each, newest first."""
    return connection.execute(
        "SELECT tasks.task_id, run_id, round, slot, attempt, state, reason, reserved_s, due_s, required_bytes,"
        " examples, steps_applied, mean_loss, seconds, memory, received_s, change_bytes, left_out"
        " FROM tasks LEFT JOIN results USING (task_id) WHERE device_id = ? ORDER BY reserved_s DESC LIMIT ?",
        (device_id, limit),
    ).fetchall()


def events_of_device(connection: Connection, name: str, *, limit: int) -> list[Row]:
    """The newest events of a device, newest first."""
    return connection.execute(
        "SELECT event_id, at_s, run_id, round, code, message FROM events WHERE device = ?"
        " ORDER BY event_id DESC LIMIT ?",
        (name, limit),
    ).fetchall()


def newest_events(connection: Connection, run_id: str, *, limit: int) -> list[Row]:
    """The newest events of a run, newest first."""
    return connection.execute(
        "SELECT event_id, at_s, round, device, code, message FROM events WHERE run_id = ?"
        " ORDER BY event_id DESC LIMIT ?",
        (run_id, limit),
    ).fetchall()


def train_losses(connection: Connection, run_id: str) -> list[tuple[int, float]]:
    """Mean loss that the devices of each committed round reported, weighted by examples, by round."""
    rows = connection.execute(
        "SELECT entered_round, sum(loss * examples) / sum(examples) AS loss FROM (SELECT coalesce(entered, round)"
        " AS entered_round, mean_loss AS loss, examples FROM tasks JOIN results USING (task_id)"
        " WHERE run_id = ? AND mean_loss IS NOT NULL AND examples > 0) AS reported JOIN rounds"
        " ON rounds.run_id = ? AND round = entered_round WHERE rounds.state = 'committed'"
        " AND rolled_back_s IS NULL GROUP BY entered_round ORDER BY entered_round",
        (run_id, run_id),
    )
    return [(int(row[0]), float(row[1])) for row in rows]


def fingerprint(connection: Connection) -> str:
    """A text that is another whenever something happened that pages show; check-ins alone do not change it."""
    asked = (
        "SELECT max(event_id) AS newest FROM events",
        "SELECT max(received_s) AS newest FROM results",
        "SELECT state, count(*) AS number, max(task_id) AS newest FROM tasks"
        " WHERE state IN ('reserved', 'working') GROUP BY state ORDER BY state",
        "SELECT run_id, round, state FROM rounds WHERE state IN ('selecting', 'collecting', 'aggregating')"
        " ORDER BY run_id, round",
        "SELECT count(*) AS number FROM evaluations WHERE state != 'pending'",
        "SELECT max(number) AS newest FROM releases",
        "SELECT state, paused_s, committed FROM runs ORDER BY position DESC LIMIT 50",
    )
    return repr([[tuple(row) for row in connection.execute(question)] for question in asked])
