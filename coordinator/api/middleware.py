"""The ASGI layers before every handler: they bound bodies, verify devices and count bytes.

They sit below the framework because a signature is over the exact path and body bytes, which only exist here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

import msgspec

from coordinator.api.app_state import AppState
from coordinator.api.statuses import status_of
from coordinator.auth import Device, authenticate, identify
from coordinator.refusals import MalformedError, RefusalError, TooLargeError
from edge_runtime.protocol.messages import MAX_CONTROL_BYTES, MAX_RESULT_BYTES, Refusal

log = logging.getLogger("coordinator")

# The interface as the ASGI specification has it: open dictionaries.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

API = "/v1/"
ADMIN = "/v1/admin/"
ENROL = "/v1/devices/enrol"
#: Key of the verified device in the request's scope.
DEVICE = "edge_device"


class AdminMiddleware:
    """Bounds the bodies of operators' requests; their token is checked by the guard of the handlers.

    Args:
        app: application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http" or not scope["path"].startswith(ADMIN):
            await self._app(scope, receive, send)
            return
        try:
            body = await _read_body(scope, receive)
        except RefusalError as refusal:
            await _send_refusal(send, scope["method"], refusal)
            return
        await self._app(scope, _replaying(body, receive), send)


class DeviceMiddleware:
    """Bounds the bodies of devices' requests, verifies their signatures, and counts bytes both ways.

    Args:
        app: application behind it.
        app_state: state that all requests share.
    """

    def __init__(self, app: ASGIApp, app_state: AppState) -> None:
        self._app = app
        self.app_state = app_state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        path = scope["path"] if scope["type"] == "http" else ""
        if not path.startswith(API) or path.startswith(ADMIN):
            await self._app(scope, receive, send)
            return
        counted = self._counting(send)
        try:
            body = await self._admit(scope, receive)
        except RefusalError as refusal:
            await _send_refusal(counted, scope["method"], refusal)
            return
        await self._app(scope, _replaying(body, receive), counted)

    async def _admit(self, scope: Scope, receive: Receive) -> bytes:
        """The body, read within bounds and verified; the device is then in ``scope``."""
        if scope["query_string"]:
            raise MalformedError("query_refused", "the device API takes no query: it would not be signed")
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").partition("?")[0]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        now_s = self.app_state.clock()
        if path != ENROL:
            await self.app_state.read(partial(identify, headers=headers, now_s=now_s))
        body = await _read_body(scope, receive)
        self.app_state.traffic.add(up_bytes=len(body))
        if path != ENROL:
            device: Device = await self.app_state.write(
                partial(
                    authenticate, headers=headers, method=scope["method"], path=path, body=body, now_s=now_s
                )
            )
            scope["state"][DEVICE] = device
        return body

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.body":
                self.app_state.traffic.add(down_bytes=len(message.get("body", b"")))
            await send(message)

        return counted


async def _send_refusal(send: Send, method: str, refusal: RefusalError) -> None:
    """Answer without the framework; the connection is closed, since the body may not have been read."""
    status = status_of(refusal)
    log.info("refused method=%s code=%s status=%d", method, refusal.code, status)
    body = msgspec.json.encode(Refusal(refusal.code, refusal.message[:2000]))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _read_body(scope: Scope, receive: Receive) -> bytes:
    limit = (
        MAX_RESULT_BYTES
        if scope["method"] == "PUT" and scope["path"].endswith("/result")
        else MAX_CONTROL_BYTES
    )
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not announced.isdigit() or int(announced) > limit:
        raise TooLargeError("too_large", f"the body is announced with more than the limit of {limit} bytes")
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise MalformedError("malformed", "the connection closed before the body was complete")
        chunk: bytes = message.get("body", b"")
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise TooLargeError("too_large", f"the body exceeds the limit of {limit} bytes")
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that hands the body out again, then waits for the connection as before."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
