"""The device API as typed calls: they sign requests, read answers, and tell whose fault a bad answer is.

A 2xx status is an answer. 408, 425, 429 and 5xx mean: try again later. Any other 4xx is a refusal with a reason code,
unless something in between, such as a proxy, answered in the coordinator's place. Everything else breaks the protocol.
Accordingly, each call raises :class:`UnreachableError`, :class:`RefusedError` or :class:`ProtocolError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from secrets import token_urlsafe
from typing import TypeVar

import msgspec

from edge_runtime.agent.transport import Request, Response, Transport
from edge_runtime.errors import ProtocolError, RefusedError, UnreachableError
from edge_runtime.log import warn
from edge_runtime.package.package import sha256_of
from edge_runtime.protocol.messages import (
    DIRECT_HEADER,
    CheckInRequest,
    CheckInResponse,
    DeviceEvent,
    EnrolRequest,
    EnrolResponse,
    MaskingStage,
    Refusal,
    ResultReceipt,
    RevealedShares,
    SealedShares,
    Standing,
    UploadStanding,
    decode,
    encode,
)
from edge_runtime.protocol.signing import PrivateKey, sign_request

JSON = "application/json"
MESSAGE_PACK = "application/msgpack"
BYTES = "application/octet-stream"
T = TypeVar("T", UploadStanding, ResultReceipt)

_TRY_LATER = {408, 425, 429}
#: Statuses of a refused result that concern the device, not the result.
_ABOUT_THE_DEVICE = {401, 403}
#: Largest difference of clocks that signatures are corrected by: a wrong day, and a wrong time zone on top of it. A
#: larger one is for a person to mend.
MAX_CORRECTION_S = 38 * 3600.0


def enrol(transport: Transport, request: EnrolRequest) -> EnrolResponse:
    """Join the coordinator, once. This is the only call without a signature.

    Raises:
        CoordinatorError: the coordinator cannot be reached, refuses the token, or breaks the protocol.
    """
    answer = transport.send(Request("POST", "/v1/devices/enrol", encode(request), {"Content-Type": JSON}))
    _check_status(answer)
    return decode(answer.body, EnrolResponse)


class Client:
    """Signed calls of one enrolled device.

    Args:
        transport: the way to the coordinator.
        key: the device's key.
        device_id: the id that the device got when it enrolled.
        clock: source of the time in seconds since 1970.
    """

    def __init__(
        self, transport: Transport, key: PrivateKey, device_id: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._transport = transport
        self._key = key
        self._device_id = device_id
        self._clock = clock
        #: What this machine's clock lacks of the coordinator's, where that has refused a signature for it.
        self._behind_s = 0.0

    def check_in(self, request: CheckInRequest) -> CheckInResponse:
        """Offer the device for work."""
        answer = self._send(Request("POST", "/v1/check-in", encode(request), {"Content-Type": JSON}))
        _check_status(answer)
        return decode(answer.body, CheckInResponse)  # type: ignore[arg-type] # to msgspec a union is a type

    def fetch_blob(self, sha256: str, part: Path, *, max_bytes: int) -> None:
        """Download a blob into ``part``, or the rest of it if ``part`` has a beginning.

        Args:
            sha256: digest that names the blob; whether the bytes match it is for the caller to check.
            part: file that takes the bytes; after an error it holds those that came so far.
            max_bytes: largest size of the whole blob.
        """
        path = f"/v1/blobs/{sha256}"
        headers = {**_rest_of(part, sha256), DIRECT_HEADER: "1"}
        answer = self._send(Request("GET", path, headers=headers, max_bytes=max_bytes, sink=part))
        if answer.status == HTTPStatus.TEMPORARY_REDIRECT:
            url = answer.headers.get("location", "")
            if self._fetch_elsewhere(url, sha256, part, max_bytes=max_bytes):
                return
            answer = self._send(
                Request("GET", path, headers=_rest_of(part, sha256), max_bytes=max_bytes, sink=part)
            )
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
            raise UnreachableError(f"the download of blob {sha256} cannot be continued; it starts over")
        _check_status(answer)

    def _fetch_elsewhere(self, url: str, sha256: str, part: Path, *, max_bytes: int) -> bool:
        """Download a blob at an address that the coordinator gave, unsigned; False if the coordinator must be asked.

        What other servers hold is not the coordinator's word, so the bytes are compared at once.
        """
        headers = {name: value for name, value in _rest_of(part, sha256).items() if name == "Range"}
        try:
            answer = self._transport.send(
                Request("GET", "/", headers=headers, max_bytes=max_bytes, sink=part, url=url)
            )
        except (UnreachableError, ProtocolError) as error:
            warn("direct_download_failed", sha256=sha256, reason=str(error))
            return False
        if answer.status in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT} and sha256_of(part) == sha256:
            return True
        if answer.status in {HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT}:
            part.unlink()
        warn("direct_download_failed", sha256=sha256, reason=f"status {answer.status}, or other bytes")
        return False

    def put_result(self, task_id: str, body: bytes) -> ResultReceipt | Refusal:
        """Hand in a result. A :class:`Refusal` concerns this result and is final."""
        path = f"/v1/tasks/{task_id}/result"
        return self._about_result(Request("PUT", path, body, {"Content-Type": MESSAGE_PACK}), ResultReceipt)

    def upload_standing(self, task_id: str, sha256: str) -> UploadStanding | Refusal:
        """How far the upload of a result has come that is named by its sha256."""
        return self._about_result(Request("GET", f"/v1/tasks/{task_id}/upload/{sha256}"), UploadStanding)

    def put_part(self, task_id: str, sha256: str, offset: int, data: bytes) -> UploadStanding | Refusal:
        """Send the part of a result that begins at ``offset``."""
        path = f"/v1/tasks/{task_id}/upload/{sha256}/{offset}"
        return self._about_result(Request("PUT", path, data, {"Content-Type": BYTES}), UploadStanding)

    def finish_upload(self, task_id: str, sha256: str) -> ResultReceipt | Refusal:
        """Hand in a result whose parts have all been sent."""
        return self._about_result(Request("POST", f"/v1/tasks/{task_id}/upload/{sha256}"), ResultReceipt)

    def masking_stage(self, task_id: str) -> MaskingStage:
        """What is asked of the device for a task whose contribution is masked."""
        answer = self._send(Request("GET", f"/v1/tasks/{task_id}/masking"))
        _check_status(answer)
        return decode(answer.body, MaskingStage)  # type: ignore[arg-type] # to msgspec a union is a type

    def put_masking(
        self, task_id: str, what: str, body: bytes | SealedShares | RevealedShares
    ) -> ResultReceipt:
        """Answer a stage: ``shares``, ``vector`` or ``reveal``."""
        kind = BYTES if isinstance(body, bytes) else JSON
        data = body if isinstance(body, bytes) else encode(body)
        answer = self._send(
            Request("PUT", f"/v1/tasks/{task_id}/masking/{what}", data, {"Content-Type": kind})
        )
        _check_status(answer)
        return decode(answer.body, ResultReceipt)

    def say_alive(self, task_id: str) -> Standing:
        """Say that a task is being worked on, and learn how it stands."""
        answer = self._send(Request("POST", f"/v1/tasks/{task_id}/alive"))
        _check_status(answer)
        return decode(answer.body, Standing)

    def send_event(self, event: DeviceEvent) -> None:
        """Send operators an event."""
        answer = self._send(Request("POST", "/v1/events", encode(event), {"Content-Type": JSON}))
        _check_status(answer)

    def probe(self) -> Response:
        """The answer to a signed request that changes nothing: one for a blob that cannot exist."""
        return self._send(Request("GET", f"/v1/blobs/{'0' * 64}"))

    def _about_result(self, request: Request, kind: type[T]) -> T | Refusal:
        """The answer to a request about a result; a refusal of the device itself is raised."""
        answer = self._send(request)
        if 400 <= answer.status < 500 and answer.status not in _ABOUT_THE_DEVICE | _TRY_LATER:
            return _refusal(answer)
        _check_status(answer)
        return decode(answer.body, kind)

    def _send(self, request: Request) -> Response:
        """The answer to a signed request; one refused for its time is sent once more by the coordinator's clock."""
        answer = self._sign_and_send(request)
        return self._sign_and_send(request) if self._learn_clock(answer) else answer

    def _learn_clock(self, answer: Response) -> bool:
        """Whether an answer says that the clocks differ, and by how much."""
        if answer.status != HTTPStatus.UNAUTHORIZED or _code(answer) != "clock_off":
            return False
        try:
            theirs_s = parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            return False
        behind_s = theirs_s - self._clock()
        if abs(behind_s) > MAX_CORRECTION_S or abs(behind_s - self._behind_s) < 1.0:
            return False
        self._behind_s = behind_s
        warn("clock_corrected", behind_s=round(behind_s), message="signatures go by the coordinator's clock")
        return True

    def _sign_and_send(self, request: Request) -> Response:
        signature = sign_request(
            self._key,
            device_id=self._device_id,
            method=request.method,
            path=request.path,
            body=request.body,
            now_s=int(self._clock() + self._behind_s),
            nonce=token_urlsafe(16),
        )
        return self._transport.send(
            msgspec.structs.replace(request, headers={**request.headers, **signature})
        )


def _rest_of(part: Path, sha256: str) -> dict[str, str]:
    """Headers that ask for the rest of a blob of which a beginning is here."""
    held_bytes = part.stat().st_size if part.exists() else 0
    return {"Range": f"bytes={held_bytes}-", "If-Range": f'"{sha256}"'} if held_bytes else {}


def _check_status(answer: Response) -> None:
    if 200 <= answer.status < 300:
        return
    if answer.status >= 500 or answer.status in _TRY_LATER:
        raise UnreachableError(
            f"the coordinator answered {answer.status}; it is overloaded or being restarted",
            retry_after_s=_retry_after_s(answer),
        )
    if 400 <= answer.status < 500:
        refusal = _refusal(answer)
        raise RefusedError(f"refused ({refusal.code}): {refusal.message}", code=refusal.code)
    raise ProtocolError(
        f"the coordinator answered {answer.status}; set coordinator_url to its own address if it redirects"
    )


def _refusal(answer: Response) -> Refusal:
    """The refusal in the body of a 4xx answer.

    Raises:
        UnreachableError: the body is no refusal, so the answer is not the coordinator's and nothing was refused.
    """
    try:
        return decode(answer.body, Refusal)
    except ProtocolError as error:
        raise UnreachableError(
            f"the answer {answer.status} is not the coordinator's; check coordinator_url and the proxy"
        ) from error


def _code(answer: Response) -> str:
    """The code of a refusal; empty if it is none."""
    try:
        return decode(answer.body, Refusal).code
    except ProtocolError:
        return ""


def _retry_after_s(answer: Response) -> float | None:
    """The ``Retry-After`` header in seconds. Coordinators do not use its date form, which counts as absent."""
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 12 else None
