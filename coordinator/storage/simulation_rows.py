"""What only the simulation asks of the database: its clock, and questions over all rounds of its single run."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection
from coordinator.storage.task_rows import TaskWithDevice
from edge_runtime.protocol.messages import BestOf


@dataclass(frozen=True)
class HeldSlot:
    """A slot of the open round that a device holds.

    Attributes:
        task_id: id of the task.
        state: reserved or working.
        due_s: moment until which the device must have checked in, or delivered its result.
        reserved_s: moment when the slot was reserved for the device.
        device_name: name of the device.
    """

    task_id: str
    state: str
    due_s: float
    reserved_s: float
    device_name: str


@dataclass(frozen=True)
class ResultWork:
    """What a counted result took.

    Attributes:
        round: number of its round.
        task: JSON of the task that was signed.
        steps: local steps, applied or skipped.
        example_count: examples that the device has.
        estimator: how the device found its gradients, where its task left it the choice; else None.
        draws: draws of its estimates there.
    """

    round: int
    task: str
    steps: int
    example_count: int
    estimator: BestOf | None
    draws: int


@dataclass(frozen=True)
class RefusedResult:
    """A result that was refused, and why."""

    round: int
    message: str


def begin_clock(connection: Connection) -> float:
    """The moment at which the simulated clock stands; it begins at 0."""
    connection.execute("CREATE TABLE IF NOT EXISTS simulated_clock (now_s REAL NOT NULL)")
    row = connection.execute("SELECT now_s FROM simulated_clock").fetchone()
    if row is None:
        connection.execute("INSERT INTO simulated_clock VALUES (0.0)")
    return 0.0 if row is None else float(row["now_s"])


def set_clock(connection: Connection, now_s: float) -> None:
    """Move the simulated clock."""
    connection.execute("UPDATE simulated_clock SET now_s = ?", (now_s,))


def held_slots(connection: Connection) -> list[HeldSlot]:
    """Slots of the open round that somebody holds, in order."""
    rows = connection.execute(
        "SELECT task_id, state, due_s, reserved_s, name AS device_name FROM tasks JOIN devices USING (device_id)"
        " WHERE state IN ('reserved', 'working') ORDER BY slot"
    )
    return [HeldSlot(**row) for row in rows]


def count_open_tasks(connection: Connection) -> tuple[tuple[str, int], ...]:
    """How many tasks are reserved and how many working, each state by name."""
    rows = connection.execute(
        "SELECT state, count(*) FROM tasks WHERE state IN ('reserved', 'working') GROUP BY state"
    )
    return tuple((row[0], row[1]) for row in rows)


def tasks_without_result(connection: Connection) -> list[TaskWithDevice]:
    """Tasks that were handed out and have no result: those that lapsed, then those at work."""
    rows = connection.execute(
        "SELECT tasks.*, name AS device_name FROM tasks JOIN devices USING (device_id)"
        " WHERE task IS NOT NULL AND state IN ('working', 'lapsed') ORDER BY state"
    )
    return [TaskWithDevice(**row) for row in rows]


def states_in_use(connection: Connection, since: int) -> set[str]:
    """Digests of the values of tasks that were handed out since so many rounds had been committed."""
    rows = connection.execute(
        "SELECT DISTINCT json_extract(task, '$.state') FROM tasks"
        " WHERE task IS NOT NULL AND committed_before >= ?",
        (since,),
    )
    return {str(row[0]) for row in rows}


def count_handed_out(connection: Connection) -> int:
    """How many tasks were handed out."""
    return int(connection.execute("SELECT count(*) FROM tasks WHERE task IS NOT NULL").fetchone()[0])


def count_results(connection: Connection) -> int:
    """How many results counted."""
    return int(connection.execute("SELECT count(*) FROM results").fetchone()[0])


def devices_with_results(connection: Connection) -> list[str]:
    """Names of the devices that had a result counted."""
    rows = connection.execute(
        "SELECT DISTINCT name FROM results JOIN tasks USING (task_id) JOIN devices USING (device_id) ORDER BY name"
    )
    return [row["name"] for row in rows]


def work_of_results(connection: Connection) -> list[ResultWork]:
    """What each counted result took."""
    rows = connection.execute(
        "SELECT coalesce(entered, tasks.round) AS round, task, steps_applied + steps_skipped AS steps,"
        " example_count, estimator, draws"
        " FROM results JOIN tasks USING (task_id) JOIN devices USING (device_id)"
    )
    return [ResultWork(**row) for row in rows]


def steps_applied(connection: Connection, run_id: str, number: int | None) -> int | None:
    """Local steps that all results of a round applied together; None if it has none."""
    total: int | None = connection.execute(
        "SELECT sum(steps_applied) FROM results JOIN tasks USING (task_id)"
        " WHERE run_id = ? AND coalesce(entered, round) = ?",
        (run_id, number),
    ).fetchone()[0]
    return total


def schedule(connection: Connection) -> list[tuple[int, int, int, str, str, str]]:
    """Round, slot, attempt, device name, state and reason of every task, in this order."""
    rows = connection.execute(
        "SELECT round, slot, attempt, name, state, reason FROM tasks JOIN devices USING (device_id)"
        " ORDER BY round, slot, attempt"
    )
    return [tuple(row) for row in rows]


def first_not_finite(
    connection: Connection, run_id: str, *, code: str, after: int | None
) -> RefusedResult | None:
    """The first result that was refused because its numbers were not finite.

    Args:
        connection: connection to the database.
        run_id: id of the run.
        code: code of the event that tells of a refused result.
        after: number of the round that it must come after; None takes any.
    """
    row = connection.execute(
        "SELECT round, message FROM events WHERE run_id = ? AND code = ? AND round > coalesce(?, -1)"
        " AND message LIKE '%not finite%' ORDER BY event_id",
        (run_id, code, after),
    ).fetchone()
    return None if row is None else RefusedResult(**row)
