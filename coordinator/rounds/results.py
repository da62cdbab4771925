"""Taking a result in: every check comes before the first change, so a refused result leaves no trace."""

from __future__ import annotations

import hashlib
import math
import sqlite3

from coordinator.auth import Device
from coordinator.refusals import ConflictError, MalformedError, NotFoundError, UnusableError
from coordinator.rounds.deltas import check_delta
from coordinator.rounds.runs import find_run
from coordinator.storage import result_rows, task_rows
from coordinator.storage.stores import Stores
from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import Manifest
from edge_runtime.protocol.messages import Result, ResultReceipt, Task
from edge_runtime.training.feature_sums import decode_sums


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

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        device: device that sent it.
        task_id: id of the task that it was sent to.
        result: result that the device sent.
        now_s: the present moment.

    Raises:
        RefusalError: the result does not count; docs/protocol.md has the codes. Nothing has changed then.
    """
    # 1. Whose task is it, and is it this task?
    task = task_rows.find_with_round(connection, task_id)
    if task is None:
        raise NotFoundError("unknown_task", f"no task {task_id}")
    if task.device_id != device.device_id:
        raise ConflictError("not_your_task", f"task {task_id} was given to another device")
    if result.task_id != task_id:
        raise MalformedError("malformed", f"a result of task {result.task_id} was sent to task {task_id}")
    if (result.run_id, result.round) != (task.run_id, task.round):
        raise ConflictError("stale", f"task {task_id} is of run {task.run_id}, round {task.round}")
    # 2. Are these the bytes that were announced, and were they counted before?
    if hashlib.sha256(result.change).hexdigest() != result.change_sha256:
        raise UnusableError("digest_mismatch", "the change does not match its sha256; send it again")
    counted_sha256 = result_rows.change_sha256_of(connection, task_id)
    if counted_sha256 is not None:
        if counted_sha256 == result.change_sha256:
            return ResultReceipt("duplicate")
        raise ConflictError("conflict", f"another result of task {task_id} was counted")
    if task.state != "working" or task.round_state not in ("selecting", "collecting"):
        raise ConflictError("stale", f"task {task_id} is closed ({task.reason or task.state}); check in")
    # 3. Does the content fit the task?
    _check_content(find_run(stores, connection, task.run_id).manifest, task.read_task(), result)
    # 4. Count it: bytes first, so that the database never names bytes that are not there.
    stores.private_blobs.put(result.change)
    task_rows.mark_counted(connection, task_id)
    result_rows.add(connection, result, received_s=now_s)
    return ResultReceipt("counted")


def _check_content(manifest: Manifest, task: Task, result: Result) -> None:
    finite = math.isfinite(result.seconds) and (result.mean_loss is None or math.isfinite(result.mean_loss))
    if not finite:
        raise UnusableError("not_finite", "mean_loss and seconds must be finite numbers")
    if task.head == "closed_form":
        _check_sums(manifest, task, result)
        return
    limit = task.steps * task.batch_size
    if result.examples > limit:
        raise UnusableError(
            "too_many_examples", f"{result.examples} examples exceed steps times batch_size = {limit}"
        )
    if result.steps_applied > task.steps:
        raise UnusableError(
            "too_many_steps", f"{result.steps_applied} steps applied exceed the task's {task.steps}"
        )
    try:
        check_delta(manifest, task, result.change)
    except SliceError as error:
        raise UnusableError("bad_slices", str(error)) from error


def _check_sums(manifest: Manifest, task: Task, result: Result) -> None:
    """Check the sums of a whole device, which has as many rows as it has."""
    try:
        sums = decode_sums(result.change, manifest, task.sums_dtype)
    except SliceError as error:
        raise UnusableError("bad_sums", str(error)) from error
    if sums.rows != result.examples:
        raise UnusableError("bad_sums", f"sums over {sums.rows} rows came with {result.examples} examples")
