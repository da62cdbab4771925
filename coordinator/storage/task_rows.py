"""Rows of ``tasks``: which device holds which slot of a round, attempt by attempt.

A task is *reserved* until its device checks in, *working* until its result comes, and then *counted*; or it has
*lapsed*. Reserved and working ones are open.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from coordinator.storage.connection import Connection
from edge_runtime.protocol.messages import SignedTask, Task


@dataclass(frozen=True)
class TaskRow:
    """A task as it is stored.

    Attributes:
        task_id: id of the task.
        run_id: id of its run.
        round: number of its round.
        slot: slot of the round that it fills.
        attempt: 0 for the first device of the slot, 1 for the next, and so on.
        device_id: id of the device.
        state: reserved, working, counted or lapsed.
        reason: why it lapsed; empty otherwise.
        reserved_s: moment when the slot was reserved for the device.
        due_s: moment until which the device must have checked in (reserved), or delivered its result (working).
        required_bytes: predicted peak of memory; 0 until it is handed out.
        task: JSON of the task that was signed; None until it is handed out.
        signature: the coordinator's signature of ``task``.
        alive_by_s: moment until which the device must have given another sign of life; None if it never gave one.
        committed_before: number of rounds that the run had committed when it was handed out.
    """

    task_id: str
    run_id: str
    round: int
    slot: int
    attempt: int
    device_id: str
    state: str
    reason: str
    reserved_s: float
    due_s: float
    required_bytes: int
    task: str | None
    signature: str | None
    alive_by_s: float | None
    committed_before: int

    @property
    def signed(self) -> SignedTask | None:
        """What the device was handed out; None if it has not checked in yet."""
        if self.task is None or self.signature is None:
            return None
        return SignedTask(self.task, self.signature)

    def read_task(self) -> Task:
        """What the device was handed out, parsed; :class:`LookupError` if it has not checked in yet."""
        if self.task is None:
            raise LookupError(f"task {self.task_id} was not handed out")
        return msgspec.json.decode(self.task, type=Task)


@dataclass(frozen=True)
class TaskWithDevice(TaskRow):
    """A task, and the name of its device."""

    device_name: str


@dataclass(frozen=True)
class TaskWithRound(TaskRow):
    """A task, and the state of its round."""

    round_state: str


@dataclass(frozen=True)
class TaskWithSlices(TaskRow):
    """A task, and the names that its slot was dealt, the head's included."""

    slices: tuple[str, ...]


@dataclass(frozen=True)
class TaskOutcome:
    """How far a task got, and the name of its device."""

    task_id: str
    state: str
    reason: str
    device_name: str


def find(connection: Connection, task_id: str) -> TaskRow | None:
    """The task with this id."""
    row = connection.execute("SELECT * FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
    return None if row is None else TaskRow(**row)


def find_with_round(connection: Connection, task_id: str) -> TaskWithRound | None:
    """The task with this id, and its round's state."""
    row = connection.execute(
        "SELECT tasks.*, rounds.state AS round_state FROM tasks JOIN rounds USING (run_id, round)"
        " WHERE task_id = ?",
        (task_id,),
    ).fetchone()
    return None if row is None else TaskWithRound(**row)


def find_open(connection: Connection, run_id: str, device_id: str) -> TaskWithSlices | None:
    """The open task of a device, and what its slot was dealt."""
    row = connection.execute(
        "SELECT tasks.*, slots.slices FROM tasks JOIN slots USING (run_id, round, slot)"
        " WHERE tasks.run_id = ? AND device_id = ? AND state IN ('reserved', 'working')",
        (run_id, device_id),
    ).fetchone()
    if row is None:
        return None
    return TaskWithSlices(**{**dict(row), "slices": tuple(json.loads(row["slices"]))})


def held_elsewhere(connection: Connection, run_id: str) -> set[str]:
    """Ids of the devices that hold an open task of another run than this."""
    rows = connection.execute(
        "SELECT device_id FROM tasks WHERE run_id != ? AND state IN ('reserved', 'working')", (run_id,)
    )
    return {str(row["device_id"]) for row in rows}


def of_round(connection: Connection, run_id: str, number: int) -> list[TaskWithDevice]:
    """All tasks of a round, slot by slot and attempt by attempt."""
    rows = connection.execute(
        "SELECT tasks.*, name AS device_name FROM tasks JOIN devices USING (device_id)"
        " WHERE run_id = ? AND round = ? ORDER BY slot, attempt",
        (run_id, number),
    )
    return [TaskWithDevice(**row) for row in rows]


def asked_in_phase(connection: Connection, run_id: str, phase: str, *, times: int = 1) -> set[str]:
    """Ids of the devices that rounds of a phase asked so many times, or whose result counted in one."""
    rows = connection.execute(
        "SELECT device_id FROM rounds JOIN tasks USING (run_id, round) WHERE run_id = ? AND phase = ?"
        " AND rolled_back_s IS NULL"
        " GROUP BY device_id HAVING count(*) >= ? OR max(CASE WHEN tasks.state = 'counted' THEN 1 ELSE 0 END) = 1",
        (run_id, phase, times),
    )
    return {str(row["device_id"]) for row in rows}


def overdue(connection: Connection, run_id: str, *, now_s: float) -> list[TaskWithDevice]:
    """Open tasks of a run whose time has run out."""
    rows = connection.execute(
        "SELECT tasks.*, name AS device_name FROM tasks JOIN devices USING (device_id)"
        " WHERE run_id = ? AND state IN ('reserved', 'working')"
        " AND (due_s < ? OR alive_by_s < ?) ORDER BY round, slot, attempt",
        (run_id, now_s, now_s),
    )
    return [TaskWithDevice(**row) for row in rows]


def outcomes(connection: Connection, run_id: str, number: int) -> list[TaskOutcome]:
    """How far each task of a round got, slot by slot and attempt by attempt."""
    rows = connection.execute(
        "SELECT task_id, tasks.state, reason, name AS device_name FROM tasks JOIN devices USING (device_id)"
        " WHERE run_id = ? AND round = ? ORDER BY slot, attempt",
        (run_id, number),
    )
    return [TaskOutcome(**row) for row in rows]


def count(connection: Connection, run_id: str, number: int, state: str) -> int:
    """How many tasks of a round are in a state."""
    return int(
        connection.execute(
            "SELECT count(*) FROM tasks WHERE run_id = ? AND round = ? AND state = ?", (run_id, number, state)
        ).fetchone()[0]
    )


def has_open(connection: Connection, run_id: str, number: int) -> bool:
    """Whether a round has an open task."""
    row = connection.execute(
        "SELECT 1 FROM tasks WHERE run_id = ? AND round = ? AND state IN ('reserved', 'working') LIMIT 1",
        (run_id, number),
    ).fetchone()
    return row is not None


def undecided(connection: Connection, reasons: Collection[str]) -> set[str]:
    """Ids of the tasks whose results may still come: those at work, and those that lapsed for one of these reasons."""
    marks = ", ".join("?" * len(reasons))
    rows = connection.execute(
        f"SELECT task_id FROM tasks JOIN rounds USING (run_id, round) WHERE tasks.state = 'working'"  # noqa: S608
        f" OR (tasks.state = 'lapsed' AND tasks.reason IN ({marks}) AND rounds.closed_s IS NULL)",
        tuple(reasons),
    )
    return {str(row["task_id"]) for row in rows}


def is_any_open(connection: Connection, run_id: str) -> bool:
    """Whether a run has an open task."""
    return bool(holders(connection, run_id))


def holders(connection: Connection, run_id: str) -> set[str]:
    """Ids of the devices that hold an open task of a run."""
    rows = connection.execute(
        "SELECT device_id FROM tasks WHERE run_id = ? AND state IN ('reserved', 'working')", (run_id,)
    )
    return {str(row["device_id"]) for row in rows}


def open_states(connection: Connection, run_id: str) -> dict[str, str]:
    """States of the open tasks of a run, by device."""
    rows = connection.execute(
        "SELECT device_id, state FROM tasks WHERE run_id = ? AND state IN ('reserved', 'working')", (run_id,)
    )
    return {str(row["device_id"]): str(row["state"]) for row in rows}


def count_attempts(connection: Connection, run_id: str, number: int, slot: int) -> int:
    """How many devices a slot of a round was reserved for so far."""
    return int(
        connection.execute(
            "SELECT count(*) FROM tasks WHERE run_id = ? AND round = ? AND slot = ?", (run_id, number, slot)
        ).fetchone()[0]
    )


def count_failures_in_a_row(
    connection: Connection, run_id: str, device_id: str, *, reasons: Collection[str]
) -> int:
    """How many tasks of a run a device has failed since its last counted result, and since it was last resumed.

    Args:
        connection: connection to the database.
        run_id: id of the run.
        device_id: id of the device.
        reasons: reasons of lapsed tasks that are failures.
    """
    rows = connection.execute(
        "SELECT state, reason FROM tasks JOIN devices USING (device_id) WHERE run_id = ? AND device_id = ?"
        " AND reserved_s >= coalesce(resumed_s, 0) ORDER BY reserved_s DESC, round DESC",
        (run_id, device_id),
    )
    failures = 0
    for state, reason in rows:
        if state == "counted":
            break
        failures += reason in reasons
    return failures


def reserve(
    connection: Connection,
    task_id: str,
    *,
    run_id: str,
    number: int,
    slot: int,
    attempt: int,
    device_id: str,
    reserved_s: float,
    due_s: float,
) -> None:
    """Add a reserved task."""
    connection.execute(
        "INSERT INTO tasks (task_id, run_id, round, slot, attempt, device_id, state, reserved_s, due_s)"
        " VALUES (?, ?, ?, ?, ?, ?, 'reserved', ?, ?)",
        (task_id, run_id, number, slot, attempt, device_id, reserved_s, due_s),
    )


def hand_out(
    connection: Connection,
    task_id: str,
    *,
    due_s: float,
    required_bytes: int,
    task: str,
    signature: str,
    committed_before: int,
) -> None:
    """Store what a device was handed out: from now on it works on it."""
    connection.execute(
        "UPDATE tasks SET state = 'working', due_s = ?, required_bytes = ?, task = ?, signature = ?,"
        " committed_before = ? WHERE task_id = ?",
        (due_s, required_bytes, task, signature, committed_before, task_id),
    )


def note_alive(connection: Connection, task_id: str, *, by_s: float) -> None:
    """Remember until when a device that works on a task must have given another sign of life."""
    connection.execute("UPDATE tasks SET alive_by_s = ? WHERE task_id = ?", (by_s, task_id))


def mark_counted(connection: Connection, task_id: str) -> None:
    """Mark a task whose result counts."""
    connection.execute("UPDATE tasks SET state = 'counted', reason = '' WHERE task_id = ?", (task_id,))


def lapse(connection: Connection, task_id: str, reason: str) -> None:
    """Let a task lapse."""
    connection.execute("UPDATE tasks SET state = 'lapsed', reason = ? WHERE task_id = ?", (reason, task_id))


def is_slot_taken(connection: Connection, run_id: str, number: int, slot: int) -> bool:
    """Whether a device works on a slot of a round, or has filled it."""
    row = connection.execute(
        "SELECT 1 FROM tasks WHERE run_id = ? AND round = ? AND slot = ? AND state IN ('working', 'counted')",
        (run_id, number, slot),
    ).fetchone()
    return row is not None


def may_come_late(
    connection: Connection,
    run_id: str,
    number: int,
    *,
    due_after_s: float,
    reasons: Collection[str],
) -> bool:
    """Whether a slot of a round that nobody has filled had a task that lapsed for one of these reasons lately.

    Args:
        connection: connection to the database.
        run_id: id of the run.
        number: number of the round.
        due_after_s: moment after which the task was due.
        reasons: reasons for which it lapsed.
    """
    marks = ", ".join("?" * len(reasons))
    row = connection.execute(
        f"SELECT 1 FROM tasks AS late WHERE run_id = ? AND round = ? AND state = 'lapsed' AND due_s >= ?"  # noqa: S608
        f" AND reason IN ({marks}) AND NOT EXISTS (SELECT 1 FROM tasks WHERE run_id = late.run_id"
        " AND round = late.round AND slot = late.slot AND state = 'counted') LIMIT 1",
        (run_id, number, due_after_s, *reasons),
    ).fetchone()
    return row is not None


def lapse_reserved_of_slot(connection: Connection, run_id: str, number: int, slot: int, reason: str) -> None:
    """Let a slot's task lapse that waits for its device."""
    connection.execute(
        "UPDATE tasks SET state = 'lapsed', reason = ?"
        " WHERE run_id = ? AND round = ? AND slot = ? AND state = 'reserved'",
        (reason, run_id, number, slot),
    )


def lapse_open_of_device(connection: Connection, device_id: str) -> None:
    """Let a revoked device's open tasks lapse."""
    connection.execute(
        "UPDATE tasks SET state = 'lapsed', reason = 'revoked'"
        " WHERE device_id = ? AND state IN ('reserved', 'working')",
        (device_id,),
    )


def lapse_open_of_round(connection: Connection, run_id: str, number: int) -> None:
    """Let the open tasks of a round that closes lapse."""
    connection.execute(
        "UPDATE tasks SET state = 'lapsed', reason = 'closed'"
        " WHERE run_id = ? AND round = ? AND state IN ('reserved', 'working')",
        (run_id, number),
    )


def lapse_open_of_run(connection: Connection, run_id: str, reason: str = "closed") -> None:
    """Let the open tasks of a run that ends, or goes back, lapse."""
    connection.execute(
        "UPDATE tasks SET state = 'lapsed', reason = ? WHERE run_id = ? AND state IN ('reserved', 'working')",
        (reason, run_id),
    )


def lapse_older(connection: Connection, run_id: str, committed: int, reason: str) -> None:
    """Let tasks of a run lapse that were handed out before it had committed so many rounds."""
    connection.execute(
        "UPDATE tasks SET state = 'lapsed', reason = ?"
        " WHERE run_id = ? AND state = 'working' AND committed_before < ?",
        (reason, run_id, committed),
    )


def extend_open(connection: Connection, run_id: str, until_s: float, *, alive_by_s: float) -> None:
    """Give the run's open tasks until ``until_s`` at least, and until ``alive_by_s`` for a sign of life."""
    connection.execute(
        "UPDATE tasks SET due_s = CASE WHEN due_s < ? THEN ? ELSE due_s END,"
        " alive_by_s = CASE WHEN alive_by_s < ? THEN ? ELSE alive_by_s END"
        " WHERE run_id = ? AND state IN ('reserved', 'working')",
        (until_s, until_s, alive_by_s, alive_by_s, run_id),
    )
