"""Rows of ``results``: what came with each counted result. The delta itself is a private blob."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import msgspec

from coordinator.storage.connection import Connection
from edge_runtime.protocol.messages import BestOf, MemoryReport, Result

#: Results that entered a round of a run. The first conditions say it; the last finds them by indexes (the empty text
#: keeps SQLite from beginning with all tasks of the run), so that a round of a long run costs what one of a short does.
_ENTERED = (
    "run_id || '' = ? AND coalesce(entered, round) = ? AND task_id IN (SELECT task_id FROM tasks WHERE run_id = ?"
    " AND round = ? UNION ALL SELECT task_id FROM results WHERE entered = ?)"
)
#: Digest of no bytes: of a result that adds no sums to those that stand.
NOTHING = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class ResultRow:
    """A counted result as it is stored.

    Attributes:
        task_id: id of its task.
        change_sha256: digest of the delta's bytes.
        examples: examples behind the delta.
        steps_applied: local steps that moved the device's values.
        steps_skipped: local steps that could not be applied.
        mean_loss: mean loss over the examples; None if it was not measured.
        seconds: seconds that the device trained.
        memory: memory that the device predicted and measured.
        received_s: moment when the result came.
        change_bytes: size of the delta on its way; 0 if it was stored before sizes were.
        estimator: how the device found its gradients, where its task left it the choice; else None.
        draws: draws of its estimates there; 0 of exact gradients, and where there was no choice.
        score: how many times the delta exceeds its round's median; None before the round was aggregated, and where it
            is no finite number.
        left_out: why the delta did not enter the round's mean; empty if it did.
        entered: number of the round that it entered, where that is not its task's.
        kept: digests of the sums from earlier runs that stand on, as JSON.
        removed: digests of those that came back to be taken off, as JSON.
    """

    task_id: str
    change_sha256: str
    examples: int
    steps_applied: int
    steps_skipped: int
    mean_loss: float | None
    seconds: float
    memory: MemoryReport
    received_s: float
    change_bytes: int
    estimator: BestOf | None
    draws: int
    score: float | None
    left_out: str
    entered: int | None
    kept: str
    removed: str


@dataclass(frozen=True)
class CountedResult:
    """What the aggregation needs to know of a counted result.

    Attributes:
        task_id: id of its task.
        device_id: id of the device that sent it.
        device_name: name of that device.
        slot: slot of the round that it filled.
        task: JSON of the task that was signed.
        change_sha256: digest of the delta's bytes.
        examples: examples behind the delta.
        steps_applied: local steps that moved the device's values.
        estimator: how the device found its gradients, where its task left it the choice; else None.
        draws: draws of its estimates there.
        committed_before: number of rounds that the run had committed when its task was handed out.
        kept: digests of the sums from earlier runs that stand on.
        removed: digests of those that came back to be taken off.
        change_bytes: size of all that came.
    """

    task_id: str
    device_id: str
    device_name: str
    slot: int
    task: str
    change_sha256: str
    examples: int
    steps_applied: int
    estimator: BestOf | None
    draws: int
    committed_before: int
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    change_bytes: int

    @property
    def adds_sums(self) -> bool:
        """Whether sums came that are added to those that stand."""
        return self.change_sha256 != NOTHING


def _entered(run_id: str, number: int) -> tuple[str, int, str, int, int]:
    """What :data:`_ENTERED` is asked with."""
    return run_id, number, run_id, number, number


def add(connection: Connection, result: Result, *, received_s: float, entered: int | None = None) -> None:
    """Store a result, and which round it enters where that is not its task's."""
    connection.execute(
        "INSERT INTO results (task_id, change_sha256, examples, steps_applied, steps_skipped, mean_loss,"
        " seconds, memory, received_s, change_bytes, estimator, draws, entered, kept, removed)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            result.task_id,
            result.change_sha256,
            result.examples,
            result.steps_applied,
            result.steps_skipped,
            result.mean_loss,
            result.seconds,
            msgspec.json.encode(result.memory).decode(),
            received_s,
            len(result.change) + sum(map(len, result.removed)),
            result.update,
            result.draws,
            entered,
            json.dumps(result.kept),
            json.dumps([hashlib.sha256(data).hexdigest() for data in result.removed]),
        ),
    )


def change_sha256_of(connection: Connection, task_id: str) -> str | None:
    """Digest of the delta that was counted for a task; None if none was."""
    row = connection.execute("SELECT change_sha256 FROM results WHERE task_id = ?", (task_id,)).fetchone()
    return None if row is None else str(row["change_sha256"])


def of_round(connection: Connection, run_id: str, number: int) -> list[ResultRow]:
    """All results that entered a round, in the order of their tasks' rounds and slots."""
    rows = connection.execute(
        f"SELECT results.* FROM results JOIN tasks USING (task_id) WHERE {_ENTERED} ORDER BY round, slot",  # noqa: S608
        _entered(run_id, number),
    )
    return [
        ResultRow(**{**dict(row), "memory": msgspec.json.decode(row["memory"], type=MemoryReport)})
        for row in rows
    ]


def counted(connection: Connection, run_id: str, number: int) -> list[CountedResult]:
    """What a round's aggregation sums up, in the order of their tasks' rounds and slots."""
    rows = connection.execute(
        "SELECT task_id, device_id, name AS device_name, slot, task, change_sha256, examples, steps_applied,"
        " estimator, draws, committed_before, kept, removed, change_bytes"
        " FROM tasks JOIN results USING (task_id) JOIN devices USING (device_id)"
        " WHERE run_id = ? AND coalesce(entered, round) = ? AND state = 'counted' ORDER BY round, slot",
        (run_id, number),
    )
    return [
        CountedResult(
            **{**row, "kept": tuple(json.loads(row["kept"])), "removed": tuple(json.loads(row["removed"]))}
        )
        for row in map(dict, rows)
    ]


def standing_sums(connection: Connection, run_id: str, device_id: str) -> tuple[str, ...]:
    """Digests of the sums of a device that stand in those of a run, which may go on from earlier ones.

    Args:
        connection: connection to the database.
        run_id: id of the run; the sums are those of its last visit.
        device_id: id of the device.
    """
    asked: str | None = run_id
    while asked is not None:
        row = connection.execute(
            "SELECT kept, change_sha256 FROM tasks JOIN results USING (task_id) JOIN rounds USING (run_id, round)"
            " WHERE run_id = ? AND device_id = ? AND tasks.state = 'counted'"
            " AND rounds.state = 'committed' AND rounds.phase = 'last_visit' LIMIT 1",
            (asked, device_id),
        ).fetchone()
        if row is not None:
            added = () if row["change_sha256"] == NOTHING else (str(row["change_sha256"]),)
            return (*json.loads(row["kept"]), *added)
        # Nothing of this device stands in it: look at the run that it went on from.
        earlier = connection.execute("SELECT config FROM runs WHERE run_id = ?", (asked,)).fetchone()
        asked = None if earlier is None else json.loads(earlier["config"]).get("continue_from")
    return ()


def devices_of(connection: Connection, run_id: str, number: int) -> dict[str, str]:
    """Names of the devices whose results entered a round, by task."""
    rows = connection.execute(
        "SELECT task_id, name FROM results JOIN tasks USING (task_id) JOIN devices USING (device_id)"  # noqa: S608
        f" WHERE {_ENTERED}",
        _entered(run_id, number),
    )
    return {str(row["task_id"]): str(row["name"]) for row in rows}


def count_entered(connection: Connection, run_id: str, number: int) -> int:
    """How many results of a buffered run entered a round."""
    return int(
        connection.execute(
            "SELECT count(*) FROM results JOIN tasks USING (task_id) WHERE run_id = ? AND entered = ?",
            (run_id, number),
        ).fetchone()[0]
    )


def withdraw(connection: Connection, run_id: str, number: int) -> None:
    """Let the results that wait for a round which has not opened count as of the one before it."""
    connection.execute(
        "UPDATE results SET entered = ? WHERE entered = ?"
        " AND task_id IN (SELECT task_id FROM tasks WHERE run_id = ?)",
        (number - 1, number, run_id),
    )


def note_score(connection: Connection, task_id: str, score: float | None) -> None:
    """Remember how many times a result's delta exceeds its round's median."""
    connection.execute("UPDATE results SET score = ? WHERE task_id = ?", (score, task_id))


def note_left_out(connection: Connection, task_id: str, reason: str) -> None:
    """Remember why a result did not enter its round's mean."""
    connection.execute("UPDATE results SET left_out = ? WHERE task_id = ?", (reason, task_id))


def count_left_out(connection: Connection, run_id: str, device_id: str) -> int:
    """How many results of a device a run has left out, since the device was last resumed."""
    row = connection.execute(
        "SELECT count(*) FROM results JOIN tasks USING (task_id) JOIN devices USING (device_id)"
        " WHERE run_id = ? AND device_id = ? AND left_out != '' AND received_s >= coalesce(resumed_s, 0)",
        (run_id, device_id),
    ).fetchone()
    return int(row[0])


def needed_blobs(connection: Connection) -> set[str]:
    """Digests of the private blobs needed at present: what came in open rounds, and the servers' states of runs."""
    open_rows = connection.execute(
        "SELECT change_sha256, removed FROM results JOIN tasks USING (task_id)"
        " JOIN runs USING (run_id) LEFT JOIN rounds"
        " ON rounds.run_id = tasks.run_id AND rounds.round = coalesce(entered, tasks.round)"
        " WHERE runs.state = 'running'"
        " AND coalesce(rounds.state, 'selecting') IN ('selecting', 'collecting', 'aggregating')"
    )
    came = {digest for row in open_rows for digest in (row["change_sha256"], *json.loads(row["removed"]))}
    vectors = connection.execute("SELECT data FROM masked_answers WHERE stage = 'vector'")
    came |= {bytes(row["data"]).decode("ascii") for row in vectors}
    states = connection.execute("SELECT optimizer_sha256 FROM runs WHERE optimizer_sha256 IS NOT NULL")
    return came | {str(row["optimizer_sha256"]) for row in states}
