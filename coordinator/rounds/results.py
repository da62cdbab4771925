"""Taking a result in: every check comes before the first change, so a refused result leaves no trace."""

from __future__ import annotations

import hashlib
import math

import msgspec

from coordinator.auth import Device
from coordinator.refusals import ConflictError, MalformedError, NotFoundError, UnusableError
from coordinator.rounds.buffered import is_too_stale, round_entered
from coordinator.rounds.deltas import check_delta
from coordinator.rounds.runs import Run, find_run
from coordinator.storage import device_rows, masking_rows, result_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.stores import Stores
from coordinator.storage.task_rows import TaskRow, TaskWithRound
from edge_runtime.errors import SignatureError, SliceError
from edge_runtime.masking.agreement import check_keys
from edge_runtime.memory.plan import first_segment
from edge_runtime.package.manifest import Manifest
from edge_runtime.protocol.messages import Result, ResultReceipt, Task
from edge_runtime.training.feature_sums import decode_sums, form_of
from edge_runtime.training.protected import decode_vector, layout_of

#: Reasons of tasks that lapsed because a result, or a sign of life, did not come in time.
TIMED_OUT = frozenset({"late", "lost"})


def accept(
    stores: Stores,
    connection: Connection,
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
        result: result that the device sent, whose bytes :func:`store_bytes` has seen.
        now_s: the present moment.

    Raises:
        RefusalError: the result does not count; docs/protocol.md has the codes. Nothing has changed then.
    """
    # 1. Whose task is it, and is it this task?
    task = find_task(connection, device, task_id)
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
    run, late = check_wanted(stores, connection, task, now_s=now_s)
    # 3. Does the content fit the task?
    _check_content(
        run.manifest, task.read_task(), result, device_rows.public_key(connection, device.device_id)
    )
    # 4. Count it: bytes first, so that the database never names bytes that are not there.
    if not stores.private_blobs.is_remote:  # else store_bytes has done so
        for data in (result.change, *result.removed):
            stores.private_blobs.put(data)
    if late:
        task_rows.lapse_reserved_of_slot(connection, task.run_id, task.round, task.slot, "filled")
    task_rows.mark_counted(connection, task_id)
    entered = round_entered(connection, run) if run.is_buffered else None
    result_rows.add(connection, result, received_s=now_s, entered=entered)
    if result.masking is not None:
        masking_rows.add(connection, task_id, "keys", msgspec.json.encode(result.masking))
    return ResultReceipt("counted")


def store_bytes(stores: Stores, result: Result) -> None:
    """Store what a result brings, if that takes long, before the transaction in which :func:`accept` counts it.

    What does not count in the end is swept away with what else nobody needs.
    """
    if stores.private_blobs.is_remote:
        for data in (result.change, *result.removed):
            stores.private_blobs.put(data)


def find_task(connection: Connection, device: Device, task_id: str) -> TaskWithRound:
    """A device's own task.

    Raises:
        NotFoundError: ``unknown_task``.
        ConflictError: ``not_your_task``.
    """
    task = task_rows.find_with_round(connection, task_id)
    if task is None:
        raise NotFoundError("unknown_task", f"no task {task_id}")
    if task.device_id != device.device_id:
        raise ConflictError("not_your_task", f"task {task_id} was given to another device")
    return task


def check_wanted(
    stores: Stores, connection: Connection, task: TaskWithRound, *, now_s: float
) -> tuple[Run, bool]:
    """The run of a task whose result would be taken now, and whether it would come after its deadline.

    Raises:
        ConflictError: ``stale``.
    """
    run = find_run(stores, connection, task.run_id)
    late = _in_grace(connection, task, run.config.late_grace_s, now_s=now_s)
    if not _is_round_open(connection, run, task) or not (task.state == "working" or late):
        raise ConflictError("stale", f"task {task.task_id} is closed ({task.reason or task.state}); check in")
    return run, late


def _is_round_open(connection: Connection, run: Run, task: TaskWithRound) -> bool:
    """Whether there is a round that a task's result could enter."""
    if run.is_buffered:
        return run.state == "running" and not is_too_stale(connection, run, task)
    return task.round_state in ("selecting", "collecting")


def _in_grace(connection: Connection, task: TaskRow, grace_s: float, *, now_s: float) -> bool:
    """Whether a task lapsed for its time alone, may still be answered, and nobody else works on its place."""
    if task.state != "lapsed" or task.reason not in TIMED_OUT or now_s > task.due_s + grace_s:
        return False
    return not task_rows.is_slot_taken(connection, task.run_id, task.round, task.slot)


def _check_keys(task: Task, result: Result, identity: str) -> None:
    """Of a task whose contribution is masked, the result brings keys, and nothing that could be read."""
    if not task.masked:
        raise UnusableError(
            "masking_not_asked", "the task masks nothing, the result brings keys for it: leave them out"
        )
    if result.masking is None or result.change or result.kept or result.removed:
        raise UnusableError(
            "not_masked", "the task's contribution is to be masked: the result brings its keys, and no change"
        )
    try:
        check_keys(identity, task.task_id, result.masking)
    except SignatureError as error:
        raise UnusableError("bad_keys", str(error)) from error


def _check_content(manifest: Manifest, task: Task, result: Result, identity: str) -> None:
    finite = math.isfinite(result.seconds) and (result.mean_loss is None or math.isfinite(result.mean_loss))
    if not finite:
        raise UnusableError("not_finite", "mean_loss and seconds must be finite numbers")
    _check_estimator(manifest, task, result)
    if task.masked or result.masking is not None:
        _check_keys(task, result, identity)
        return
    if task.head == "closed_form":
        _check_sums(manifest, task, result)
        return
    if result.kept or result.removed:
        raise UnusableError(
            "bad_difference", "the task gathers no sums, the result tells of some from before"
        )
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
    """Check the sums of a device, which has as many rows as it has; or what has changed of them since."""
    _check_what_stood(task, result)
    if task.noised:
        try:
            decode_vector(result.change, layout_of(task, manifest))
        except SliceError as error:
            raise UnusableError("bad_sums", str(error)) from error
        return
    rows = 0
    if result.change or not task.handed_in:
        try:
            rows = decode_sums(result.change, form_of(task, manifest)).rows
        except SliceError as error:
            raise UnusableError("bad_sums", str(error)) from error
    if rows != result.examples:
        raise UnusableError("bad_sums", f"sums over {rows} rows came with {result.examples} examples")


def _check_what_stood(task: Task, result: Result) -> None:
    """A result tells of all sums that the device handed in before, and takes off these alone, byte by byte."""
    removed = [hashlib.sha256(data).hexdigest() for data in result.removed]
    told = [*result.kept, *removed]
    if sorted(told) == sorted(task.handed_in):
        return
    unknown = next((digest for digest in told if digest not in task.handed_in), None)
    if unknown is not None:
        what = f"it tells of sums {unknown[:12]}…, which this device did not hand in"
    else:
        what = f"it tells of {len(told)} of the {len(task.handed_in)} sums that this device handed in before"
    raise UnusableError(
        "bad_difference", f"the result does not fit what stood before: {what}; none was changed"
    )


def _check_estimator(manifest: Manifest, task: Task, result: Result) -> None:
    """A result tells how its gradients were found exactly where the task left that open, and tells what can be."""
    if task.update != "best":
        if result.update is not None or result.draws:
            raise UnusableError(
                "estimator_not_asked",
                f'the task says update = "{task.update}", the result tells of update = "{result.update}" and '
                f"{result.draws} draws; leave both out",
            )
        return
    if result.update is None:
        raise UnusableError(
            "estimator_missing", 'the task says update = "best": the result must tell which it took'
        )
    first = first_segment(manifest, task.slices)
    if result.update == "backprop":
        if result.draws:
            raise UnusableError(
                "too_many_draws", f"exact gradients make no draws, the result tells of {result.draws}"
            )
        if first is not None and any(segment.adjoint is None for segment in manifest.segments[first:]):
            raise UnusableError(
                "estimator_unavailable",
                f'package {manifest.name} has no adjoint programs, the result tells of update = "backprop"; '
                "take forward mode",
            )
    elif not 1 <= result.draws <= task.draws:
        raise UnusableError(
            "too_many_draws", f"the task asks for 1 to {task.draws} draws, the result tells of {result.draws}"
        )
