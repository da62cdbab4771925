"""Results on their way to the coordinator: small ones whole, others in parts that go on where they stood."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from edge_runtime.agent.client import Client
from edge_runtime.agent.downloads import RESUME_PAUSE_S
from edge_runtime.errors import UnreachableError
from edge_runtime.protocol.messages import PART_BYTES, Refusal, ResultReceipt, UploadStanding

#: Code of a coordinator that knows no uploads in parts.
_UNKNOWN_PATH = "unknown_path"
#: Codes after which an upload is begun anew, or goes on elsewhere: nothing is decided about the result.
_START_OVER = frozenset({"wrong_offset", "digest_mismatch"})


def deliver(
    client: Client, task_id: str, body: bytes, sleep: Callable[[float], None]
) -> ResultReceipt | Refusal:
    """Hand in a result. A :class:`Refusal` concerns this result and is final.

    An upload that breaks off is continued as long as more bytes arrive.

    Args:
        client: signed calls to the coordinator.
        task_id: id of the task.
        body: the encoded result.
        sleep: function through which all waiting goes, in seconds.

    Raises:
        UnreachableError: the coordinator does not answer, or takes nothing; the next attempt goes on where this stood.
        CoordinatorError: it refuses the device, or breaks the protocol.
    """
    if len(body) <= PART_BYTES:
        return client.put_result(task_id, body)
    sha256 = hashlib.sha256(body).hexdigest()
    stood = -1
    while True:
        standing = client.upload_standing(task_id, sha256)
        if isinstance(standing, Refusal):
            return client.put_result(task_id, body) if standing.code == _UNKNOWN_PATH else standing
        if standing.counted:
            return ResultReceipt("duplicate")
        try:
            return _send_rest(client, task_id, sha256, body, standing)
        except UnreachableError:
            if standing.received_bytes <= stood:
                raise
            stood = standing.received_bytes
            sleep(RESUME_PAUSE_S)


def _send_rest(
    client: Client, task_id: str, sha256: str, body: bytes, standing: UploadStanding
) -> ResultReceipt | Refusal:
    while standing.received_bytes < len(body):
        offset = standing.received_bytes
        answer = client.put_part(task_id, sha256, offset, body[offset : offset + PART_BYTES])
        if isinstance(answer, Refusal):
            return _final(answer)
        if answer.received_bytes <= offset:
            raise UnreachableError(f"the coordinator took nothing of the result of task {task_id}")
        standing = answer
    receipt = client.finish_upload(task_id, sha256)
    return _final(receipt) if isinstance(receipt, Refusal) else receipt


def _final(refusal: Refusal) -> Refusal:
    """A refusal that decides about the result.

    Raises:
        UnreachableError: it does not: the upload only stands elsewhere than was thought.
    """
    if refusal.code in _START_OVER:
        raise UnreachableError(f"the upload cannot go on ({refusal.code}): {refusal.message}")
    return refusal
