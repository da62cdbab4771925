"""Results that come in parts, so that one whose upload breaks off goes on where it stood.

Each part is a signed request of its own: its bytes are verified before they are kept. Whether the result is wanted is
asked at every part, so that a device learns early that it is not.
"""

from __future__ import annotations

import re

from coordinator.auth import Device
from coordinator.refusals import ConflictError, MalformedError, TooLargeError, UnusableError
from coordinator.rounds.results import check_wanted, find_task
from coordinator.rounds.runs import find_run
from coordinator.rounds.tasks import MISSED_SIGNS
from coordinator.storage import result_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.stores import Stores
from edge_runtime.errors import ProtocolError
from edge_runtime.protocol.messages import END, MAX_RESULT_BYTES, Result, UploadStanding, decode_result

_SHA256 = re.compile(f"^[0-9a-f]{{64}}{END}")


def standing(
    stores: Stores, connection: Connection, device: Device, task_id: str, sha256: str, *, now_s: float
) -> UploadStanding:
    """How many bytes of a result have come.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        device: device that asks.
        task_id: id of the task.
        sha256: sha256 of the whole encoded result, which names the upload.
        now_s: the present moment.

    Raises:
        RefusalError: the result would not count, as :func:`coordinator.rounds.results.accept` says.
    """
    _check_name(sha256)
    task = find_task(connection, device, task_id)
    if result_rows.change_sha256_of(connection, task_id) is not None:
        return UploadStanding(0, counted=True)
    check_wanted(stores, connection, task, now_s=now_s)
    return UploadStanding(stores.uploads.received_bytes(task_id, sha256))


def add_part(
    stores: Stores,
    connection: Connection,
    device: Device,
    task_id: str,
    sha256: str,
    offset: int,
    data: bytes,
    *,
    now_s: float,
) -> UploadStanding:
    """Take a part of a result in; it is a sign of life too.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        device: device that sent it.
        task_id: id of the task.
        sha256: sha256 of the whole encoded result.
        offset: place of the part's first byte, which must be where the upload stands.
        data: bytes of the part, at least one.
        now_s: the present moment.

    Raises:
        ConflictError: ``wrong_offset``.
        TooLargeError: ``too_large``.
        RefusalError: the result would not count.
        OSError: the disk is full; the upload stands where it stood.
    """
    _check_name(sha256)
    if not data:
        raise MalformedError("malformed", "a part of a result has at least one byte")
    if offset + len(data) > MAX_RESULT_BYTES:
        raise TooLargeError("too_large", f"the result exceeds the limit of {MAX_RESULT_BYTES} bytes")
    task = find_task(connection, device, task_id)
    check_wanted(stores, connection, task, now_s=now_s)
    here = stores.uploads.received_bytes(task_id, sha256)
    if offset != here:
        raise ConflictError(
            "wrong_offset",
            f"{here} bytes of this result are here, the part begins at {offset}; go on at {here}",
        )
    if task.alive_by_s is not None:
        again_s = find_run(stores, connection, task.run_id).config.alive_every_s
        task_rows.note_alive(connection, task_id, by_s=now_s + MISSED_SIGNS * again_s)
    return UploadStanding(stores.uploads.append(task_id, sha256, data))


def read_whole(stores: Stores, task_id: str, sha256: str) -> Result:
    """A result whose parts have all come.

    Raises:
        UnusableError: ``digest_mismatch``, bytes are missing or damaged; none of them is kept.
        MalformedError: ``malformed``, they are no result.
    """
    data = stores.uploads.whole(task_id, sha256)
    if data is None:
        raise UnusableError(
            "digest_mismatch",
            "the bytes that came are not those of the announced sha256; begin the upload anew",
        )
    try:
        return decode_result(data)
    except ProtocolError as error:
        raise MalformedError("malformed", str(error)) from error


def check_owner(connection: Connection, device: Device, task_id: str, sha256: str) -> None:
    """Refuse to finish an upload of another device's task, or one that is named by no sha256."""
    _check_name(sha256)
    find_task(connection, device, task_id)


def _check_name(sha256: str) -> None:
    if _SHA256.search(sha256) is None:
        raise MalformedError(
            "malformed", "an upload is named by the sha256 of its result, 64 hexadecimal digits"
        )
