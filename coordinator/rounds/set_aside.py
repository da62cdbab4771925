"""Devices that a run asks no more: they failed for a cause that lasts, or too often in a row.

A device is set aside for one run. It is asked again as soon as it says that it was set up anew, or at the operator's
word.
"""

from __future__ import annotations

from coordinator.auth import Device
from coordinator.events import record
from coordinator.refusals import ConflictError, NotFoundError
from coordinator.storage import device_rows, result_rows, run_rows, set_aside_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.set_aside_rows import SetAsideRow
from edge_runtime.protocol.messages import DeviceEvent

#: Tasks in a row that a device may fail for causes that may pass.
FAILURES_IN_A_ROW = 3
#: Events of a device that count as such a failure.
COUNTED = frozenset({"task_failed", "out_of_memory"})
#: Events of a device that last whatever it says of them: it takes no task that its pinned key has not signed.
ALWAYS_LASTING = frozenset({"task_untrusted"})
CODE = "device_set_aside"


def note_failure(
    connection: Connection, run_id: str, device: Device, event: DeviceEvent, *, now_s: float
) -> None:
    """Judge an event by which a device gave a task of a run back, after the task has lapsed.

    Args:
        connection: connection with a transaction under way.
        run_id: id of the run.
        device: device that failed.
        event: what it said.
        now_s: the present moment.
    """
    if event.lasting or event.code in ALWAYS_LASTING:
        _set_aside(connection, run_id, device, event.message, now_s=now_s)
    elif event.code in COUNTED:
        failures = task_rows.count_failures_in_a_row(connection, run_id, device.device_id, reasons=COUNTED)
        if failures >= FAILURES_IN_A_ROW:
            reason = f"{failures} tasks failed in a row; the last: {event.message}"
            _set_aside(connection, run_id, device, reason, now_s=now_s)


def note_left_out(
    connection: Connection,
    run_id: str,
    device_id: str,
    device_name: str,
    reason: str,
    *,
    most: int,
    now_s: float,
) -> None:
    """Judge a result that was left out of its round's mean, after that was noted.

    Args:
        connection: connection with a transaction under way.
        run_id: id of the run.
        device_id: id of the device that sent it.
        device_name: its name.
        reason: why it was left out.
        most: number of such results at which the device is set aside.
        now_s: the present moment.
    """
    left_out = result_rows.count_left_out(connection, run_id, device_id)
    if left_out >= most:
        words = f"{left_out} of its results were left out; the last: {reason}"
        _set_aside(connection, run_id, Device(device_id, device_name), words, now_s=now_s)


def still_set_aside(
    connection: Connection, run_id: str, device: Device, *, now_s: float
) -> SetAsideRow | None:
    """Why a run asks a device no more; None if it may be asked, or was set up anew since.

    Args:
        connection: connection with a transaction under way, in which the device's check-in was noted.
        run_id: id of the run.
        device: device that checks in.
        now_s: the present moment.
    """
    row = set_aside_rows.find(connection, run_id, device.device_id)
    if row is None or row.setup == device_rows.setup_of(connection, device.device_id):
        return row
    _ask_again(connection, run_id, device, "it was set up anew", now_s=now_s)
    return None


def resume(connection: Connection, name: str, *, now_s: float) -> Device:
    """Let the runs that are going on ask a device again, at the operator's word.

    Args:
        connection: connection with a transaction under way.
        name: name or id of the device.
        now_s: the present moment.

    Returns:
        the device.

    Raises:
        NotFoundError: ``unknown_device``.
        ConflictError: ``not_set_aside``.
    """
    found = device_rows.find_unrevoked(connection, name)
    if found is None:
        raise NotFoundError(
            "unknown_device", f"no device {name} is enrolled; list them with: edge-coordinator device list"
        )
    runs = [
        run.run_id
        for run in run_rows.active(connection)
        if set_aside_rows.find(connection, run.run_id, found.device_id) is not None
    ]
    if not runs:
        raise ConflictError(
            "not_set_aside",
            f"device {found.name} is not set aside by any run that is going on; nothing to do",
        )
    device = Device(found.device_id, found.name)
    for run_id in runs:
        _ask_again(connection, run_id, device, "by the operator", now_s=now_s)
    return device


def _set_aside(connection: Connection, run_id: str, device: Device, reason: str, *, now_s: float) -> None:
    setup = device_rows.setup_of(connection, device.device_id)
    set_aside_rows.add(connection, run_id, device.device_id, at_s=now_s, reason=reason, setup=setup)
    record(connection, now_s, CODE, reason, run_id=run_id, device=device.name)


def _ask_again(connection: Connection, run_id: str, device: Device, why: str, *, now_s: float) -> None:
    set_aside_rows.remove(connection, run_id, device.device_id)
    device_rows.note_resumed(connection, device.device_id, at_s=now_s)
    record(connection, now_s, "device_resumed", why, run_id=run_id, device=device.name)
