"""Taking a result in: every check comes before the first change, so a refused result leaves no trace."""

from __future__ import annotations

import hashlib
import math
import sqlite3

import msgspec

from coordinator.auth import Device
from coordinator.refusals import RefusalError
from coordinator.rounds.changes import check_change
from coordinator.rounds.runs import Run, find_run
from coordinator.storage.stores import Stores
from edge_runtime.errors import SliceError
from edge_runtime.protocol.messages import MemoryReport, Result, ResultReceipt, Task


def accept(
    stores: Stores,
    connection: sqlite3.Connection,
    device: Device,
    task_id: str,
    result: Result,
    *,
    now_s: float,
) -> ResultReceipt:
    """Count a result, or say that it was counted before.

    Raises:
        RefusalError: 4xx with the codes of docs/protocol.md; nothing has changed then.
    """
    # 1. Whose task is it, and is it this task?
    row = connection.execute(
        "SELECT tasks.*, rounds.state AS round_state FROM tasks JOIN rounds USING (run_id, round)"
        " WHERE task_id = ?",
        (task_id,),
    ).fetchone()
    if row is None:
        raise RefusalError(404, "unknown_task", f"no task {task_id}")
    if row["device_id"] != device.device_id:
        raise RefusalError(409, "not_your_task", f"task {task_id} was given to another device")
    if result.task_id != task_id:
        raise RefusalError(400, "malformed", f"a result of task {result.task_id} was sent to task {task_id}")
    if (result.run_id, result.round) != (row["run_id"], row["round"]):
        raise RefusalError(409, "stale", f"task {task_id} is of run {row['run_id']}, round {row['round']}")
    # 2. Are these the bytes that were announced, and were they counted before?
    if hashlib.sha256(result.change).hexdigest() != result.change_sha256:
        raise RefusalError(422, "digest_mismatch", "the change does not match its sha256; send it again")
    counted = connection.execute("SELECT change_sha256 FROM results WHERE task_id = ?", (task_id,)).fetchone()
    if counted is not None:
        if counted["change_sha256"] == result.change_sha256:
            return ResultReceipt("duplicate")
        raise RefusalError(409, "conflict", f"another result of task {task_id} was counted")
    if row["state"] != "working" or row["round_state"] not in ("selecting", "collecting"):
        raise RefusalError(
            409, "stale", f"task {task_id} is closed ({row['reason'] or row['state']}); check in"
        )
    # 3. Does the content fit the task?
    _check_content(find_run(stores, connection, row["run_id"]), row, result)
    # 4. Count it: bytes first, so that the database never names bytes that are not there.
    stores.private_blobs.put(result.change)
    connection.execute("UPDATE tasks SET state = 'counted' WHERE task_id = ?", (task_id,))
    connection.execute(
        "INSERT INTO results (task_id, change_sha256, examples, steps_applied, steps_skipped, mean_loss,"
        " seconds, memory, received_s, change_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            task_id,
            result.change_sha256,
            result.examples,
            result.steps_applied,
            result.steps_skipped,
            result.mean_loss,
            result.seconds,
            msgspec.json.encode(result.memory).decode(),
            now_s,
            len(result.change),
        ),
    )
    return ResultReceipt("counted")


def memory_of(row: sqlite3.Row) -> MemoryReport:
    """The memory report of a row of ``results``."""
    return msgspec.json.decode(row["memory"], type=MemoryReport)


def _check_content(run: Run, row: sqlite3.Row, result: Result) -> None:
    finite = math.isfinite(result.seconds) and (result.mean_loss is None or math.isfinite(result.mean_loss))
    if not finite:
        raise RefusalError(422, "not_finite", "mean_loss and seconds must be finite numbers")
    task = msgspec.json.decode(row["task"], type=Task)
    limit = task.steps * task.batch_size
    if result.examples > limit:
        raise RefusalError(
            422, "too_many_examples", f"{result.examples} examples exceed steps times batch_size = {limit}"
        )
    if result.steps_applied > task.steps:
        raise RefusalError(
            422, "too_many_steps", f"{result.steps_applied} steps applied exceed the task's {task.steps}"
        )
    try:
        check_change(run.manifest, task, result.change)
    except SliceError as error:
        raise RefusalError(422, "bad_slices", str(error)) from error
