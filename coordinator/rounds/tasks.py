"""What a device gets when it checks in, and how a place of a round changes hands."""

from __future__ import annotations

import json
import sqlite3

from coordinator.auth import Device
from coordinator.events import record
from coordinator.refusals import RefusalError
from coordinator.rounds.memory_requirements import required_bytes
from coordinator.rounds.runs import Run, active_run
from coordinator.storage.stores import Stores
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    PROTOCOL_VERSION,
    CheckInRequest,
    CheckInResponse,
    ComeBack,
    DeviceEvent,
    NotEligible,
    SignedTask,
    Task,
    training_settings,
)

#: Seconds between check-ins while there is no run, and after one has ended.
IDLE_WINDOW_S = (1.0, 3.0)
FINISHED_WINDOW_S = (30.0, 60.0)
#: Events by which a device gives a task back.
GIVING_BACK = frozenset({"task_refused", "task_failed", "out_of_memory"})


def check_in(
    stores: Stores, connection: sqlite3.Connection, device: Device, request: CheckInRequest, *, now_s: float
) -> CheckInResponse:
    """Answer a device that offers itself for work.

    A task that was handed out before and is still open is answered again, byte for byte.
    """
    # 1. Remember what it said of itself.
    connection.execute(
        "UPDATE devices SET seen_s = ?, cap_bytes = ?, floor_bytes = ?, example_count = ?,"
        " runtime_version = ? WHERE device_id = ?",
        (
            now_s,
            request.cap_bytes,
            request.floor_bytes,
            request.example_count,
            request.runtime_version,
            device.device_id,
        ),
    )
    if request.protocol > PROTOCOL_VERSION:
        return NotEligible(
            "protocol_unknown", f"protocol {request.protocol} is newer than {PROTOCOL_VERSION} spoken here"
        )
    # 2. Is there a run?
    run = active_run(stores, connection)
    if run is None or run.state == "evaluating":
        ended = run is not None or connection.execute("SELECT 1 FROM runs WHERE state != 'queued'").fetchone()
        return ComeBack(*FINISHED_WINDOW_S, "run finished") if ended else ComeBack(*IDLE_WINDOW_S, "no run")
    # 3. Does it hold a place of the open round?
    row = connection.execute(
        "SELECT tasks.*, slots.slices FROM tasks JOIN slots USING (run_id, round, slot)"
        " WHERE tasks.run_id = ? AND device_id = ? AND state IN ('reserved', 'working')",
        (run.run_id, device.device_id),
    ).fetchone()
    if row is not None and row["state"] == "working":
        return SignedTask(row["task"], row["signature"])
    if row is not None:
        return _hand_out(stores, connection, run, row=row, device=device, request=request, now_s=now_s)
    # 4. Could it hold one?
    needed = _least_required_bytes(connection, run, request.floor_bytes)
    if needed > request.cap_bytes:
        return _too_small(connection, run, device, needed, request.cap_bytes, now_s=now_s)
    open_round = connection.execute(
        "SELECT 1 FROM rounds WHERE run_id = ? AND state IN ('selecting', 'collecting', 'aggregating')",
        (run.run_id,),
    ).fetchone()
    reason = "not selected" if open_round or run.next_round > 0 else "waiting for devices"
    return ComeBack(run.config.poll_min_s, run.config.poll_max_s, reason)


def report_event(connection: sqlite3.Connection, device: Device, event: DeviceEvent, *, now_s: float) -> None:
    """Record a device's event; those of :data:`GIVING_BACK` give its task back.

    Raises:
        RefusalError: 404 ``unknown_task``, 409 ``not_your_task``, 400 ``malformed`` (no task named).
    """
    if event.task_id is None:
        if event.code in GIVING_BACK:
            raise RefusalError(400, "malformed", f"{event.code} must name its task_id")
        record(connection, now_s, event.code, event.message, device=device.name)
        return
    row = connection.execute("SELECT * FROM tasks WHERE task_id = ?", (event.task_id,)).fetchone()
    if row is None:
        raise RefusalError(404, "unknown_task", f"no task {event.task_id}")
    if row["device_id"] != device.device_id:
        raise RefusalError(409, "not_your_task", f"task {event.task_id} was given to another device")
    record(
        connection,
        now_s,
        event.code,
        event.message,
        run_id=row["run_id"],
        round_number=row["round"],
        device=device.name,
        task_id=event.task_id,
    )
    if event.code in GIVING_BACK and row["state"] in ("reserved", "working"):
        lapse(connection, event.task_id, event.code)


def reserve(
    connection: sqlite3.Connection, run: Run, round_number: int, slot: int, device_id: str, *, now_s: float
) -> None:
    """Keep a place of a round for a device until it checks in, at most ``selection_timeout_s``."""
    attempt = connection.execute(
        "SELECT count(*) FROM tasks WHERE run_id = ? AND round = ? AND slot = ?",
        (run.run_id, round_number, slot),
    ).fetchone()[0]
    connection.execute(
        "INSERT INTO tasks (task_id, run_id, round, slot, attempt, device_id, state, reserved_s, due_s)"
        " VALUES (?, ?, ?, ?, ?, ?, 'reserved', ?, ?)",
        (
            f"{run.run_id}-r{round_number}-s{slot}-a{attempt}",
            run.run_id,
            round_number,
            slot,
            attempt,
            device_id,
            now_s,
            now_s + run.config.selection_timeout_s,
        ),
    )


def lapse(connection: sqlite3.Connection, task_id: str, reason: str) -> None:
    """Take a task back; its place becomes free for another device."""
    connection.execute("UPDATE tasks SET state = 'lapsed', reason = ? WHERE task_id = ?", (reason, task_id))


def _hand_out(
    stores: Stores,
    connection: sqlite3.Connection,
    run: Run,
    *,
    row: sqlite3.Row,
    device: Device,
    request: CheckInRequest,
    now_s: float,
) -> SignedTask | NotEligible:
    dealt = json.loads(row["slices"])
    needed = required_bytes(run.manifest, run.config, dealt, request.floor_bytes)
    if needed > request.cap_bytes:
        lapse(connection, row["task_id"], "cap_too_small")
        return _too_small(connection, run, device, needed, request.cap_bytes, now_s=now_s)
    config = run.config
    head = run.manifest.head
    shared = training_settings(config)
    shared["train_head"] = head is not None and head.name in dealt
    shared["sequence_limit"] = min(config.sequence_limit, run.manifest.sequence_limit)
    task = Task(
        task_id=row["task_id"],
        run_id=run.run_id,
        round=row["round"],
        slot=row["slot"],
        package=run.package_sha256,
        package_signature=run.package_signature,
        state=run.values_sha256,
        slices=tuple(name for name in dealt if head is None or name != head.name),
        optimizer=config.local_optimizer,
        required_bytes=needed,
        deadline_s=config.deadline_s,
        freeze_a=config.lora_aggregation == "frozen_a",
        reference=run.reference_sha256,
        **shared,
    )
    data = messages.encode(task)
    signature = stores.key.sign(data)
    connection.execute(
        "UPDATE tasks SET state = 'working', due_s = ?, required_bytes = ?, task = ?, signature = ?"
        " WHERE task_id = ?",
        (now_s + config.deadline_s, needed, data.decode(), signature, row["task_id"]),
    )
    return SignedTask(data.decode(), signature)


def _least_required_bytes(connection: sqlite3.Connection, run: Run, floor_bytes: int) -> int:
    """The least that any place needs: of the open round, or of a full round to come."""
    # CROSS: the open round first, and then its places, not all places that the run ever had.
    rows = connection.execute(
        "SELECT slices FROM rounds CROSS JOIN slots USING (run_id, round)"
        " WHERE run_id = ? AND state IN ('selecting', 'collecting')",
        (run.run_id,),
    ).fetchall()
    places = [tuple(json.loads(row["slices"])) for row in rows]
    if not places:
        places = run.deal(run.config.devices_per_round)
    return min(required_bytes(run.manifest, run.config, slices, floor_bytes) for slices in set(places))


def _too_small(
    connection: sqlite3.Connection, run: Run, device: Device, needed: int, cap_bytes: int, *, now_s: float
) -> NotEligible:
    message = f"needs {needed} bytes, the cap is {cap_bytes}; grant more memory to serve run {run.run_id}"
    known = connection.execute(
        "SELECT 1 FROM events WHERE run_id = ? AND device = ? AND code = 'cap_too_small' AND message = ?",
        (run.run_id, device.name, message),
    ).fetchone()
    if known is None:
        record(connection, now_s, "cap_too_small", message, run_id=run.run_id, device=device.name)
    return NotEligible("cap_too_small", message)
