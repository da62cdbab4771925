"""The ASGI application: middleware, device API, admin API, and the two loops behind them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, Response, get
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from coordinator.api import admin_api, device_api
from coordinator.api.app_state import AppState, Clock
from coordinator.api.middleware import AdminMiddleware, DeviceMiddleware
from coordinator.api.schema_page import SchemaPage
from coordinator.api.statuses import status_of
from coordinator.auth import load_admin_token
from coordinator.refusals import RefusalError
from coordinator.rounds import evaluation, state_machine
from coordinator.storage import round_rows
from coordinator.storage.stores import open_stores
from edge_runtime import __version__ as runtime_version
from edge_runtime.protocol.messages import MAX_RESULT_BYTES, Refusal

log = logging.getLogger("coordinator")

#: Longest time between two looks at the open round; requests that may move it wake the loop at once.
TICK_S = 0.2


def create_app(
    state: Path, *, clock: Clock = time.time, on_crash: Callable[[], None] = lambda: None
) -> DeviceMiddleware:
    """The application on a state folder.

    Args:
        state: state folder, created and filled on first use.
        clock: function that tells the seconds since 1970.
        on_crash: function that is called if a loop behind the API ends by an error that nobody foresaw, so that the
            server can stop.

    Raises:
        ConfigError: the state folder cannot be used.
    """
    app_state = AppState(open_stores(state), load_admin_token(state), clock)

    @asynccontextmanager
    async def loops(app: Litestar) -> AsyncIterator[None]:
        del app
        await asyncio.to_thread(state_machine.resume, app_state.stores, app_state.clock())
        running = [
            asyncio.create_task(play_rounds(app_state)),
            asyncio.create_task(evaluate_models(app_state)),
        ]
        for loop in running:
            loop.add_done_callback(partial(_report_crash, on_crash=on_crash))
        try:
            yield
        finally:
            for loop in running:
                loop.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            app_state.close()

    async def provide_app_state() -> AppState:
        return app_state

    app = Litestar(
        [health, *device_api.HANDLERS, admin_api.ROUTER],
        dependencies={"app_state": Provide(provide_app_state)},
        exception_handlers={
            RefusalError: answer_refusal,
            HTTPException: answer_http_error,
            Exception: answer_crash,
        },
        lifespan=[loops],
        openapi_config=OpenAPIConfig(
            title="Edge coordinator",
            version=runtime_version,
            render_plugins=[SchemaPage(), JsonRenderPlugin()],
        ),
        request_max_body_size=MAX_RESULT_BYTES,
        logging_config=None,
        signature_namespace={"AppState": AppState},
    )
    app.state.app_state = app_state
    return DeviceMiddleware(AdminMiddleware(app), app_state)


async def play_rounds(app_state: AppState) -> None:
    """Play the open round whenever something happened, and at least every :data:`TICK_S`."""
    while True:
        app_state.wake.clear()
        up_bytes, down_bytes = app_state.traffic.take()
        if up_bytes or down_bytes:
            await app_state.write(partial(round_rows.add_bytes, up_bytes=up_bytes, down_bytes=down_bytes))
        await asyncio.to_thread(state_machine.play, app_state.stores, app_state.clock())
        try:
            await asyncio.wait_for(app_state.wake.wait(), TICK_S)
        except TimeoutError:
            continue


async def evaluate_models(app_state: AppState) -> None:
    """Make the evaluations that wait, one at a time."""
    while True:
        waiting = await asyncio.to_thread(evaluation.next_evaluation, app_state.stores)
        if waiting is None:
            await asyncio.sleep(TICK_S)
            continue
        outcome = await evaluation.evaluate(waiting)
        await app_state.write(
            partial(evaluation.store_evaluation, evaluation=waiting, outcome=outcome, now_s=app_state.clock())
        )


@get("/healthz", sync_to_thread=False)
def health() -> dict[str, str]:
    """Tell anybody that the process serves, and nothing else."""
    return {"status": "ok"}


def answer_refusal(request: Request[Any, Any, Any], refusal: RefusalError) -> Response[Refusal]:
    """A refusal in the protocol's own form."""
    return _refuse(request.method, status_of(refusal), refusal.code, refusal.message)


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Refusal]:
    """A refusal by the framework, for a path, method or body that it does not accept, in the protocol's own form."""
    codes = {400: "malformed", 404: "unknown_path", 405: "unknown_method", 413: "too_large"}
    code = codes.get(error.status_code, f"http_{error.status_code}")
    fields = error.extra if isinstance(error.extra, list) else []
    named = [
        f"{entry.get('key', 'body')}: {entry.get('message', '')}"
        for entry in fields
        if isinstance(entry, dict)
    ]
    return _refuse(request.method, error.status_code, code, "; ".join([error.detail, *named]))


def answer_crash(request: Request[Any, Any, Any], error: Exception) -> Response[Refusal]:
    """An error that nobody foresaw: its traceback goes to the log, a bare 500 to the other side."""
    log.error("crashed method=%s path=%s", request.method, request.url.path, exc_info=error)
    return Response(Refusal("internal", "the coordinator failed; its log tells why"), status_code=500)


def _refuse(method: str, status: int, code: str, message: str) -> Response[Refusal]:
    log.info("refused method=%s code=%s status=%d", method, code, status)
    return Response(Refusal(code, message[:2000]), status_code=status)


def _report_crash(loop: asyncio.Task[None], on_crash: Callable[[], None]) -> None:
    if loop.cancelled():
        return
    log.critical("loop_ended name=%s", loop.get_name(), exc_info=loop.exception())
    on_crash()
