"""A coordinator in memory, behind the agent's transport protocol: no sockets, and faults on demand."""

from __future__ import annotations

import hashlib
from collections import deque

import msgspec

from edge_runtime.agent.transport import Request, Response
from edge_runtime.errors import ProtocolError, SignatureError, UnreachableError
from edge_runtime.protocol.messages import (
    CheckInRequest,
    CheckInResponse,
    ComeBack,
    DeviceEvent,
    EnrolRequest,
    EnrolResponse,
    Refusal,
    Result,
    ResultReceipt,
    SignedTask,
    Standing,
    Task,
    decode,
    decode_result,
    encode,
)
from edge_runtime.protocol.signing import check_body, generate_key, parse_request_signature, verify_headers

TOKEN = "one-time-token-0001"
DEVICE_ID = "d-1"


class CoordinatorSimulator:
    """Answers as a coordinator would; tests fill ``blobs`` and ``answers`` and read what arrived.

    ``broken_downloads`` says after how many bytes each of the coming downloads breaks off;
    ``planned`` holds statuses with which the coming requests are answered instead.
    """

    def __init__(self) -> None:
        self.key = generate_key()
        self.device_key: str | None = None
        self.blobs: dict[str, bytes] = {}
        self.answers: deque[CheckInResponse] = deque()
        self.planned: deque[Response | None] = deque()
        self.broken_downloads: deque[int] = deque()
        self.check_ins: list[CheckInRequest] = []
        self.results: dict[str, Result] = {}
        self.receipts: list[str] = []
        self.events: list[DeviceEvent] = []
        self.requests: list[Request] = []
        self.refuse_results: Response | None = None
        self.nonces: set[str] = set()
        #: How tasks stand whose devices say that they work on them; None for a coordinator that knows no such signs.
        self.standing: Standing | None = None

    def add_blob(self, data: bytes) -> str:
        """Offer a blob; returns its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return sha256

    def offer(self, task: Task) -> None:
        """Answer the next check-in with this task, signed."""
        text = encode(task).decode()
        self.answers.append(SignedTask(text, self.key.sign(text.encode())))

    def send(self, request: Request) -> Response:
        """See :class:`edge_runtime.agent.transport.Transport`."""
        if request.path.endswith("/alive"):
            return ok(self.standing) if self.standing else refusal(404, "unknown_path", "no such path")
        self.requests.append(request)
        planned = self.planned.popleft() if self.planned else None
        if planned is not None:
            return planned
        if request.path == "/v1/devices/enrol":
            return self._enrol(decode(request.body, EnrolRequest))
        try:
            self._authenticate(request)
        except SignatureError as error:
            return refusal(401, "bad_signature", str(error))
        return self._serve(request)

    def _serve(self, request: Request) -> Response:
        if request.path == "/v1/check-in":
            self.check_ins.append(decode(request.body, CheckInRequest))
            return ok(self.answers.popleft() if self.answers else ComeBack(10.0, 20.0))
        if request.path == "/v1/events":
            self.events.append(decode(request.body, DeviceEvent))
            return Response(204)
        if request.method == "GET":
            return self._blob(request, request.path.removeprefix("/v1/blobs/"))
        return self._result(decode_result(request.body))

    def _enrol(self, request: EnrolRequest) -> Response:
        if request.token != TOKEN:
            return refusal(401, "unknown_token", "no such enrolment token")
        self.device_key = request.public_key
        return ok(EnrolResponse(DEVICE_ID, self.key.public_key))

    def _authenticate(self, request: Request) -> None:
        signature = parse_request_signature(request.headers)
        if self.device_key is None or signature.device_id != DEVICE_ID or signature.nonce in self.nonces:
            raise SignatureError("unknown device or nonce seen before")
        self.nonces.add(signature.nonce)
        verify_headers(self.device_key, signature, method=request.method, path=request.path)
        check_body(signature, hashlib.sha256(request.body).digest())

    def _blob(self, request: Request, sha256: str) -> Response:
        data = self.blobs.get(sha256)
        if data is None or request.sink is None:
            return refusal(404, "unknown_blob", "no such blob")
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if len(data) > request.max_bytes:
            raise ProtocolError("the answer is over its limit")
        part = data[start:]
        broken = self.broken_downloads.popleft() if self.broken_downloads else None
        with request.sink.open("ab" if start else "wb") as file:
            file.write(part if broken is None else part[:broken])
        if broken is not None:
            raise UnreachableError("the connection broke off")
        return Response(206 if start else 200)

    def _result(self, result: Result) -> Response:
        if self.refuse_results is not None:
            return self.refuse_results
        status = "duplicate" if result.task_id in self.results else "counted"
        self.results[result.task_id] = result
        self.receipts.append(status)
        return ok(ResultReceipt(status))


def ok(message: msgspec.Struct) -> Response:
    """A 200 with this body."""
    return Response(200, {}, encode(message))


def refusal(status: int, code: str, message: str) -> Response:
    """A 4xx with this reason."""
    return Response(status, {}, encode(Refusal(code, message)))
