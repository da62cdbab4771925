"""``edge-runtime serve``: predictions over HTTP, to this machine alone, by one worker that stays up.

Whatever a browser on this machine may be made to send is refused: a request must name a loopback host and bring
``application/json``, which no page of another site can. On a Unix socket its mode, 0600, says who may ask.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

import msgspec

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import (
    ArtefactError,
    CapExceededError,
    ConfigError,
    DataError,
    EdgeError,
)
from edge_runtime.html.openapi_page import openapi_page
from edge_runtime.inference.requests import Classified, Finished, GenerateText, Piece
from edge_runtime.log import note, warn
from edge_runtime.protocol.addresses import is_loopback
from edge_runtime.serving.openapi import (
    DOCUMENT,
    HEALTH,
    JSON,
    JSON_LINES,
    PAGE,
    PREDICT,
    Health,
    PredictRequest,
    Problem,
    openapi_document,
)
from edge_runtime.serving.session import InferenceSession
from edge_runtime.serving.source import Model
from edge_runtime.worker.inference_jobs import MAX_REQUEST_BYTES, InferenceJob

#: Connections that are answered at a time; more wait to be accepted.
MAX_CONNECTIONS = 16
#: Longest silence of a client while it sends or receives.
CLIENT_TIMEOUT_S = 30.0
SOCKET_MODE = 0o600


class Served:
    """The model that is served: one worker, started when it is needed and shared by all requests.

    Args:
        current: function that gives the model to serve and the id of its release; asked before each request, so that a
            new release is served from the next one on.
        start: function that starts a worker.
    """

    def __init__(
        self,
        current: Callable[[], tuple[Model, str]],
        start: Callable[..., InferenceSession] = InferenceSession.start,
    ) -> None:
        self._current = current
        self._start = start
        self._lock = threading.Lock()
        self._session: InferenceSession | None = None
        self._serving: tuple[Model, str] | None = None
        self._job: InferenceJob | None = None

    def open(self) -> None:
        """Start the worker, so that what is wrong with the model is known before a port is opened.

        Raises:
            EdgeError: the model cannot be loaded.
        """
        with self._lock:
            self._ready_session()

    def predict(self, request: PredictRequest) -> Iterator[Classified | Piece | Finished]:
        """Predict one text; other requests wait until its iterator has ended or was closed.

        Raises:
            EdgeError: the text cannot be used; or the worker ended, and the next request starts another.
        """
        with self._lock:
            session = self._ready_session()
            model, _ = self._serving or self._current()
            if model.package.manifest.task == "classification":
                yield session.classify(request.text)
            else:
                yield from session.generate(GenerateText(request.text, request.sampling))

    def health(self) -> Health:
        """What is served now; it waits for no request."""
        session, serving = self._session, self._serving
        if session is None or serving is None:
            raise ConfigError("no model was loaded yet; ask again")
        (model, release), ready = serving, session.ready
        return Health(
            status="ready" if session.alive else "stopped",
            package=model.package.manifest.name,
            package_sha256=model.package.sha256,
            release=release,
            task=model.package.manifest.task,
            arithmetic=ready.arithmetic,
            sequence_limit=ready.sequence_limit,
            cap_bytes=model.cap_bytes,
            predicted_peak_bytes=ready.predicted_peak_bytes,
            peak_bytes=session.peak_bytes if session.alive else None,
            enforced_by=session.enforced_by,
        )

    def close(self) -> None:
        """End the worker."""
        if self._session is not None:
            self._session.close()

    def _ready_session(self) -> InferenceSession:
        """The worker that runs the current model; started anew where it ended or the model changed."""
        serving = self._current()
        session, job = self._session, serving[0].job()
        if session is not None and session.alive and not session.busy and job == self._job:
            return session
        if session is not None:
            session.close()
        model, release = serving
        model.prepare()
        self._session, self._serving, self._job = self._start(job), serving, job
        note("serving", package=model.package.manifest.name, release=release or "none")
        return self._session


class PredictionServer(ThreadingMixIn, TCPServer):
    """Accepts connections on a socket that is bound already, a bounded number of them at a time.

    Args:
        listener: the socket.
        served: what is served.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, listener: socket.socket, served: Served) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.served = served
        self.is_local = listener.family == socket.AF_UNIX
        self.server_address = listener.getsockname()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.document = openapi_document()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own, once there is a place."""
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours; anything else is logged without what was sent."""
        import sys  # noqa: PLC0415 - rarely needed

        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            warn("request_failed", error=type(error).__name__)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edge-runtime", ""
    timeout = CLIENT_TIMEOUT_S
    server: PredictionServer

    def do_GET(self) -> None:
        if not self._is_allowed():
            return
        path = self.path.partition("?")[0]
        if path == HEALTH:
            self._answer_health()
        elif path == DOCUMENT:
            self._send(200, JSON, msgspec.json.encode(self.server.document))
        elif path == PAGE:
            self._send(200, "text/html; charset=utf-8", openapi_page(self.server.document, DOCUMENT).encode())
        else:
            self._refuse(404, "not_found", f"there are {PREDICT}, {HEALTH}, {DOCUMENT} and {PAGE}")

    def do_POST(self) -> None:
        if not self._is_allowed():
            return
        if self.path.partition("?")[0] != PREDICT:
            self._refuse(404, "not_found", f"predictions are asked for at {PREDICT}")
            return
        body = self._body()
        if body is None:
            return
        try:
            request = msgspec.json.decode(body, type=PredictRequest)
        except MALFORMED as error:
            # The library's message names the field and never its value.
            self._refuse(400, "malformed", f"the body is no such request: {error}")
            return
        self._predict(request)

    def _is_allowed(self) -> bool:
        """Whether the request may come from this machine's own programs alone."""
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.server.is_local or is_loopback(name.strip("[]")):
            return True
        self._refuse(403, "host", "this server answers to this machine's own names alone, as 127.0.0.1")
        return False

    def _body(self) -> bytes | None:
        """The request's body; None where it was refused."""
        if self.headers.get_content_type() != JSON:
            self._refuse(415, "content_type", f"send {JSON}")
            return None
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            self._refuse(411, "length_required", "send the body's Content-Length")
            return None
        if len(length) > 12 or int(length) > MAX_REQUEST_BYTES:
            self._refuse(413, "too_large", f"the body may have {MAX_REQUEST_BYTES} bytes")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _predict(self, request: PredictRequest) -> None:
        answers = self.server.served.predict(request)
        try:
            first = next(answers)
            if isinstance(first, Classified):
                for _ in answers:
                    pass
                self._send(200, JSON, msgspec.json.encode(first))
                return
        except EdgeError as error:
            self._refuse(_status(error), type(error).__name__, str(error))
            return
        self._stream(first, answers)

    def _stream(self, first: Piece | Finished, answers: Iterator[Any]) -> None:
        """A generated text as it comes, in chunks of one line."""
        self.send_response(200)
        self.send_header("Content-Type", JSON_LINES)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._chunk(first)
            try:
                for answer in answers:
                    self._chunk(answer)
            except EdgeError as error:  # too late for a status
                self._chunk(Problem(type(error).__name__, str(error)))
            self.wfile.write(b"0\r\n\r\n")
        finally:
            answers.close()  # type: ignore[attr-defined] # a generator: a client that left stops the text

    def _chunk(self, message: object) -> None:
        line = msgspec.json.encode(message) + b"\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.flush()

    def _answer_health(self) -> None:
        try:
            self._send(200, JSON, msgspec.json.encode(self.server.served.health()))
        except EdgeError as error:
            self._refuse(503, type(error).__name__, str(error))

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.close_connection = True  # a body that was not read must not be taken for a request
        self._send(status, JSON, msgspec.json.encode(Problem(code, message)))

    def _send(self, status: int, media: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged: their paths are always the same, and their bodies are nobody's business."""


def _status(error: EdgeError) -> int:
    """The HTTP status for an error: whose fault it is."""
    if isinstance(error, DataError):
        return 422
    if isinstance(error, ConfigError | ArtefactError) and not isinstance(error, CapExceededError):
        return 500
    return 503


def listen_on_port(host: str, port: int) -> socket.socket:
    """A socket that listens on a loopback address.

    Raises:
        ConfigError: the address is not this machine's own, or the port cannot be had.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"--listen {host}: predictions are served to this machine alone, as on 127.0.0.1; for others put a "
            "server in front that knows who may ask"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; name another one"
        ) from error
    return listener


def listen_on_socket(path: Path) -> socket.socket:
    """A Unix socket that its owner alone may connect to; what an ended server left there is replaced.

    Raises:
        ConfigError: something else is there, another server listens on it, or it cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        before = os.umask(0o777 & ~SOCKET_MODE)  # from its first moment it is its owner's alone
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--socket {path}: {error.strerror or error}; name another place") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _make_way(path: Path) -> None:
    """Remove a socket that nobody listens on any more."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"--socket {path}: there is a file of that name; name another place")
    if _answers(path):
        raise ConfigError(f"--socket {path}: another server listens there; stop it, or name another place")
    path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
