"""The one layer before every handler: it decides who may call, bounds and verifies the body, and counts bytes.

It sits behind the framework's routing, where it is known which route a request reaches, and before its parsing, where
the exact path and bytes still exist that a signature covers. Limits come before trust: of somebody who is not known yet
nothing is read but headers, or the few bytes that a one-time token comes in.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter
from typing import Any

import msgspec
from litestar import Request
from litestar.datastructures import State

from coordinator import accounts
from coordinator.accounts import Session
from coordinator.api.access import (
    ROLES,
    SAFE_METHODS,
    Access,
    access_of,
    act_of,
    is_page,
    max_body_bytes_of,
)
from coordinator.api.app_state import AppState
from coordinator.api.body import (
    Body,
    Message,
    Receive,
    Scope,
    announced_bytes,
    check_size,
    read_into,
)
from coordinator.api.forms import Form, cookie_of, read_form
from coordinator.api.refused_pages import refused_page
from coordinator.api.statuses import headers_of, status_of
from coordinator.auth import Device, authenticate, check_monitor
from coordinator.refusals import (
    ForbiddenError,
    MalformedError,
    RefusalError,
    UnauthenticatedError,
    UnavailableError,
)
from coordinator.storage import audit_rows
from coordinator.storage.stores import INCOMING
from coordinator.storage.trouble import trouble_of
from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import SignatureError
from edge_runtime.protocol.messages import Refusal
from edge_runtime.protocol.signing import check_body

log = logging.getLogger("coordinator")

Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

#: Keys of what is known of a request, in its scope: the verified device or user, the body, a page's form, and what the
#: handler wants the audit log to tell.
DEVICE = "edge_device"
SESSION = "edge_session"
BODY = "edge_body"
FORM = "edge_form"
TOLD = "edge_told"
#: Cookies of a session, and of a form to sign in, which carries the same.
COOKIE, SIGN_IN_COOKIE = "edge_session", "edge_sign_in"
#: Longest time in which nobody takes the next piece of an answer.
SEND_SILENCE_S = 60.0


class ReadRequest(Request[None, None, State]):
    """A request whose body was read before its handler was asked."""

    async def body(self) -> bytes:
        """The body, whole."""
        body: Body = self.scope["state"][BODY]
        return body.read()

    async def json(self) -> Any:
        """The message that the handler takes, and nothing else: what is no such message is never built."""
        return self._decoded(msgspec.json.decode, await self.body())

    async def msgpack(self) -> Any:
        """The same of MessagePack."""
        return self._decoded(msgspec.msgpack.decode, await self.body())

    def _decoded(self, decode: Callable[..., Any], body: bytes) -> Any:
        field = self.route_handler.parsed_data_field
        try:
            return decode(body, type=Any if field is None else field.annotation)
        except MALFORMED as error:
            raise MalformedError(
                "malformed", f"the body is not what is expected here: {error}"[:1000]
            ) from None


class AccessMiddleware:
    """Lets a request through to its handler, or answers it.

    Args:
        app: application behind it.
        app_state: state that all requests share.
    """

    def __init__(self, app: ASGIApp, app_state: AppState) -> None:
        self._app = app
        self._app_state = app_state
        self._incoming = app_state.stores.folder / INCOMING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI), and time it."""
        begun, statuses = perf_counter(), list[int]()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self._serve(scope, receive, noting)
        finally:
            method, route, status = scope["method"], scope["path_template"], statuses[0] if statuses else 0
            seconds = perf_counter() - begun
            self._app_state.metrics.note_request(method, route, status, seconds)
            self._app_state.tracing.ended(
                f"{method} {route}",
                seconds,
                {"http.request.method": method, "http.route": route, "http.response.status_code": status},
            )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        right = access_of(scope["route_handler"])
        if right in (Access.DEVICE, Access.TOKEN_HOLDER):
            send = self._counting(scope, send)
        with Body(self._incoming) as body, Form(self._incoming) as form:
            try:
                await self._admit(right, scope, receive, body, form)
            except RefusalError as refusal:
                self._app_state.metrics.note_refusal(refusal.code)
                await self._note_refused(right, scope, refusal)
                await _send_refusal(send, scope, refusal)
                return
            except OSError as error:
                unavailable = _unavailable(error)
                self._app_state.metrics.note_refusal(unavailable.code)
                await _send_refusal(send, scope, unavailable)
                return
            scope["state"][BODY] = body
            scope["state"][FORM] = form
            if right in ROLES and scope["method"] not in SAFE_METHODS:
                await self._act(scope, receive, send)
                return
            if not body.is_large:
                await self._app(scope, receive, send)
                return
            async with self._app_state.large_body:  # parsed in memory, so one at a time
                try:
                    await self._app(scope, receive, send)
                finally:
                    # The framework keeps what it parsed as long as the connection, and in cycles.
                    scope["state"].clear()
                    gc.collect(1)

    async def _admit(self, right: Access, scope: Scope, receive: Receive, body: Body, form: Form) -> None:
        """Read and verify the body of somebody who may send one; a device or a session is then in ``scope``."""
        # 1. What is too large whoever asks.
        limit = max_body_bytes_of(scope["route_handler"])
        check_size(announced_bytes(scope), limit)
        # 2. Who asks? A device's signature covers the body by its digest, so it is verified before the body is read.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        signature = None
        if right in ROLES:
            await self._check_user(right, scope, headers)
        elif right is Access.MONITOR:
            tokens = (self._app_state.metrics_token, self._app_state.admin_token)
            check_monitor(headers.get("authorization", ""), tokens)
        elif right in (Access.DEVICE, Access.TOKEN_HOLDER) and scope["query_string"]:
            raise MalformedError("query_refused", "the device API takes no query: it would not be signed")
        if right is Access.DEVICE:
            path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").partition("?")[0]
            device, signature = await self._app_state.write(
                partial(
                    authenticate,
                    headers=headers,
                    method=scope["method"],
                    path=path,
                    now_s=self._app_state.clock(),
                    wall_s=self._app_state.wall(),
                )
            )
            scope["state"][DEVICE] = device
        # 3. Only then the body.
        await read_into(body, receive, limit)
        if right in (Access.DEVICE, Access.TOKEN_HOLDER):
            self._app_state.traffic.add(_sender(scope), up_bytes=body.size)
            self._app_state.metrics.note_bytes(up_bytes=body.size)
        if signature is not None:
            try:
                check_body(signature, body.sha256)
            except SignatureError as error:
                raise UnauthenticatedError("bad_signature", str(error)) from error
        if is_page(scope["route_handler"]) and scope["method"] not in SAFE_METHODS:
            session: Session | None = scope["state"].get(SESSION)
            csrf = cookie_of(headers, SIGN_IN_COOKIE) if session is None else session.csrf
            await asyncio.to_thread(read_form, body, headers, csrf, form)

    async def _check_user(self, right: Access, scope: Scope, headers: dict[str, str]) -> None:
        """Find out who asks, and whether a user with this role may."""
        token, now_s = self._app_state.admin_token, self._app_state.clock()
        if is_page(scope["route_handler"]):
            cookie = cookie_of(headers, COOKIE)
            session = await self._app_state.read(
                lambda connection: accounts.find_session(connection, cookie, token, now_s=now_s)
            )
            if session is None:
                raise UnauthenticatedError("signed_out", "your session has ended; sign in again")
        else:
            authorization = headers.get("authorization", "")
            session = Session(
                await self._app_state.read(
                    lambda connection: accounts.check_bearer(connection, authorization, token)
                ),
                csrf="",
            )
        scope["state"][SESSION] = session
        role = ROLES[right]
        if not session.principal.may(role):
            raise ForbiddenError(
                "no_right",
                f"{session.principal.name} is {session.principal.role}, and this needs the role {role}; ask an admin",
            )

    async def _act(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that changes something: the audit log has it before it is done, and then how it ended."""
        audit_id = await self._begin_act(scope)
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            code, detail = scope["state"].get(TOLD, ("", ""))
            outcome = code or ("done" if status < 400 else f"http_{status}")
            await self._app_state.write(
                partial(audit_rows.end, audit_id=audit_id, outcome=outcome, detail=detail)
            )

    async def _note_refused(self, right: Access, scope: Scope, refusal: RefusalError) -> None:
        """Write down what a user asked for in vain; strangers leave no trace here."""
        if right not in ROLES or scope["method"] in SAFE_METHODS or SESSION not in scope["state"]:
            return
        audit_id = await self._begin_act(scope)
        await self._app_state.write(
            partial(audit_rows.end, audit_id=audit_id, outcome=refusal.code, detail=refusal.message[:300])
        )

    async def _begin_act(self, scope: Scope) -> int:
        session: Session = scope["state"][SESSION]
        subject = " ".join(str(value) for value in scope.get("path_params", {}).values())
        return await self._app_state.write(
            partial(
                audit_rows.begin,
                at_s=self._app_state.clock(),
                who=session.principal.name,
                act=act_of(scope["route_handler"]),
                subject=subject[:200],
            )
        )

    def _counting(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.body":
                down_bytes = len(message.get("body", b""))
                self._app_state.traffic.add(_sender(scope), down_bytes=down_bytes)
                self._app_state.metrics.note_bytes(down_bytes=down_bytes)
            if not message.get("more_body", False):
                await send(message)
                return
            async with asyncio.timeout(SEND_SILENCE_S):  # of a download that nobody takes
                await send(message)

        return counted


def _sender(scope: Scope) -> str:
    """Id of the device that a request came from; empty if it is not known."""
    device: Device | None = scope["state"].get(DEVICE)
    return "" if device is None else device.device_id


def _unavailable(error: OSError) -> UnavailableError:
    """Trouble of this machine while a body came in; what is not trouble is raised again."""
    trouble = trouble_of(error)
    if trouble is None:
        raise error
    log.warning("trouble where=body reason=%r", trouble)
    return UnavailableError("trouble", f"the coordinator cannot take a body now: {trouble}; try again later")


async def _send_refusal(send: Send, scope: Scope, refusal: RefusalError) -> None:
    """Answer without the framework; the connection is closed, since the body may not have been read."""
    status = status_of(refusal)
    log.info("refused method=%s code=%s status=%d", scope["method"], refusal.code, status)
    kind, body = "application/json", msgspec.json.encode(Refusal(refusal.code, refusal.message[:2000]))
    headers = headers_of(refusal)
    if is_page(scope["route_handler"]):
        status, kind, body, more = refused_page(scope, status, refusal, scope["state"].get(SESSION))
        headers = {**headers, **more}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", kind.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *((name.lower().encode(), value.encode()) for name, value in headers.items()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})
