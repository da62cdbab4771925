"""The ASGI application: middleware, device API, admin API, and the loops behind them."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, Response, Router
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.middleware import DefineMiddleware
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from coordinator.api import acts, admin_api, device_api, live, monitor_api, sign_in
from coordinator.api.access import ACCESS, Access, is_page, stated_access
from coordinator.api.app_state import AppState, Clock
from coordinator.api.forms import forget_leftovers
from coordinator.api.loops import for_ever, patiently
from coordinator.api.middleware import SESSION, TOLD, AccessMiddleware, ReadRequest
from coordinator.api.refused_pages import refused_page
from coordinator.api.schema_page import SchemaPage
from coordinator.api.statuses import headers_of, status_of
from coordinator.auth import ADMIN_TOKEN, METRICS_TOKEN, forget_nonces, load_token
from coordinator.clock import SteadyClock
from coordinator.events import record
from coordinator.monitoring.metrics import Metrics
from coordinator.refusals import RefusalError, UnavailableError
from coordinator.rounds import evaluation, retention, state_machine
from coordinator.storage import round_rows
from coordinator.storage.stores import INCOMING, Places, open_stores
from coordinator.storage.trouble import trouble_of
from edge_runtime import __version__ as runtime_version
from edge_runtime.errors import EdgeError
from edge_runtime.protocol.messages import Refusal

log = logging.getLogger("coordinator")

#: Longest time between two looks at the open round; requests that may move it wake the loop at once.
TICK_S = 0.2
#: Time from one look at what can be forgotten to the next. Nonces are many: each look shall find few.
NONCES_S = 5.0
RETENTION_S = 600.0


def create_app(
    state: Path,
    *,
    places: Places | None = None,
    clock: Clock | None = None,
    wall: Clock = time.time,
    on_crash: Callable[[], None] = lambda: None,
) -> Litestar:
    """The application on a state folder, with what its requests share in ``app.state.app_state``.

    Args:
        state: state folder, created and filled on first use.
        places: where state lies that is not in the folder.
        clock: seconds since 1970, in time that does not jump; None counts it from now on.
        wall: seconds since 1970 by the machine's clock.
        on_crash: function that is called if a loop behind the API ends by an error that nobody foresaw, so that the
            server can stop.

    Raises:
        ConfigError: the state folder cannot be used.
        ResourceError: it cannot be used now; waiting helps.
        LookupError: a route does not say who may call it.
    """
    places = places or Places()
    stores = open_stores(state, places=places)
    forget_leftovers(stores.folder / INCOMING)
    if clock is None:  # all coordinators of a database have its time
        clock = SteadyClock(wall if places.database is None else stores.storage.wall_s)
    secrets = places.secrets or state
    tokens = load_token(secrets, ADMIN_TOKEN), load_token(secrets, METRICS_TOKEN)
    app_state = AppState(stores, *tokens, clock, wall)

    async def provide_app_state() -> AppState:
        return app_state

    app = Litestar(
        ROUTERS,
        dependencies={"app_state": Provide(provide_app_state)},
        middleware=[DefineMiddleware(AccessMiddleware, app_state=app_state)],  # type: ignore[arg-type] # ASGI, untyped
        exception_handlers={
            RefusalError: answer_refusal,
            HTTPException: answer_http_error,
            Exception: answer_crash,
        },
        lifespan=[partial(_loops, app_state, on_crash)],
        openapi_config=OpenAPIConfig(
            title="Edge coordinator",
            version=runtime_version,
            openapi_router=Router(
                "/schema", route_handlers=[], opt={ACCESS: Access.ANYBODY}, include_in_schema=False
            ),
            render_plugins=[SchemaPage(), JsonRenderPlugin()],
        ),
        request_class=ReadRequest,
        logging_config=None,
        signature_namespace={"AppState": AppState},
    )
    stated_access(app)
    app.state.app_state = app_state
    return app


@asynccontextmanager
async def _loops(app_state: AppState, on_crash: Callable[[], None], app: Litestar) -> AsyncIterator[None]:
    """What goes on behind the requests, from the start of the application to its end."""
    del app
    await patiently("resume", partial(leads, app_state))
    steps = {
        "rounds": play_rounds,
        "evaluations": evaluate_models,
        "nonces": forget_old_nonces,
        "retention": clear_out,
    }
    running = [
        asyncio.create_task(for_ever(name, partial(step, app_state)), name=name)
        for name, step in steps.items()
    ]
    for loop in running:
        loop.add_done_callback(partial(_report_crash, app_state=app_state, on_crash=on_crash))
    try:
        yield
    finally:
        for loop in running:
            loop.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        app_state.close()


async def leads(app_state: AppState) -> bool:
    """Whether this coordinator plays the rounds, one of those that share a database; alone it always does.

    Whoever begins to, first sees to it that the time in which nobody did counts against nobody.
    """
    async with app_state.claiming:
        claim = await asyncio.to_thread(app_state.leading.storage.claim)
        if claim and claim != app_state.looked_after:
            await asyncio.to_thread(state_machine.resume, app_state.leading, app_state.clock())
            app_state.looked_after = claim
            log.info("leads claim=%d", claim)
    return claim > 0


async def play_rounds(app_state: AppState) -> None:
    """Play the open rounds once, and wait until something happened, for :data:`TICK_S` at most."""
    app_state.wake.clear()
    await _look_at_clock(app_state)
    passed = app_state.traffic.take()
    if passed:
        await app_state.write(partial(round_rows.add_bytes_of, passed=passed))
    if await leads(app_state):
        await asyncio.to_thread(
            state_machine.play, app_state.leading, app_state.clock(), app_state.note_aggregation
        )
    with suppress(TimeoutError):
        await asyncio.wait_for(app_state.wake.wait(), TICK_S)


async def _look_at_clock(app_state: AppState) -> None:
    """Tell operators when the machine's clock was set: nothing is held or lost by it."""
    step_s = app_state.steps.step_s()
    if step_s:
        message = (
            f"this machine's clock was set {'forward' if step_s > 0 else 'back'} by {abs(step_s):.0f} s; deadlines go "
            "by elapsed time, and requests are accepted by either clock"
        )
        await app_state.write(partial(record, at_s=app_state.clock(), code="clock_set", message=message))


async def evaluate_models(app_state: AppState) -> None:
    """Make an evaluation if one waits."""
    waiting = None
    if await leads(app_state):
        waiting = await asyncio.to_thread(evaluation.next_evaluation, app_state.leading)
    if waiting is None:
        await asyncio.sleep(TICK_S)
        return
    outcome = await evaluation.evaluate(waiting)
    groups = None if isinstance(outcome, EdgeError) else await evaluation.evaluate_groups(waiting)
    found = partial(evaluation.store_evaluation, evaluation=waiting, outcome=outcome, groups=groups)
    await app_state.write(partial(found, now_s=app_state.clock()))


async def clear_out(app_state: AppState) -> None:
    """Remove what nobody needs any more, and wait for :data:`RETENTION_S`."""
    if await leads(app_state):
        await asyncio.to_thread(retention.clear_out, app_state.leading, app_state.wall())
    await asyncio.sleep(RETENTION_S)


async def forget_old_nonces(app_state: AppState) -> None:
    """Forget the nonces that no request can carry any more, and wait for :data:`NONCES_S`."""
    if await leads(app_state):
        await app_state.write(partial(forget_nonces, now_s=app_state.clock(), wall_s=app_state.wall()))
    await asyncio.sleep(NONCES_S)


def answer_refusal(request: Request[Any, Any, Any], refusal: RefusalError) -> Response[Any]:
    """A refusal in the protocol's own form, or as a page where the request was for one."""
    _metrics(request).note_refusal(refusal.code)
    traceback.clear_frames(
        refusal.__traceback__
    )  # an error and its frames hold each other, and these a whole body
    state = request.scope["state"]
    state[TOLD] = (refusal.code, refusal.message[:300])
    if is_page(request.scope["route_handler"]):
        status, kind, body, headers = refused_page(
            request.scope, status_of(refusal), refusal, state.get(SESSION)
        )
        return Response(body, status_code=status, media_type=kind, headers={**headers_of(refusal), **headers})
    return _refuse(request.method, status_of(refusal), refusal.code, refusal.message, headers_of(refusal))


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Refusal]:
    """A refusal by the framework, for a path, method or body that it does not accept, in the protocol's own form."""
    traceback.clear_frames(error.__traceback__)
    codes = {400: "malformed", 404: "unknown_path", 405: "unknown_method", 413: "too_large"}
    code = codes.get(error.status_code, f"http_{error.status_code}")
    fields = error.extra if isinstance(error.extra, list) else []
    named = [
        f"{entry.get('key', 'body')}: {entry.get('message', '')}"
        for entry in fields
        if isinstance(entry, dict)
    ]
    _metrics(request).note_refusal(code)
    return _refuse(request.method, error.status_code, code, "; ".join([error.detail, *named]))


def answer_crash(request: Request[Any, Any, Any], error: Exception) -> Response[Refusal]:
    """Trouble that passes is answered with 503; what nobody foresaw with a bare 500, its traceback goes to the log."""
    trouble = trouble_of(error)
    if trouble is not None:
        log.warning("trouble where=request method=%s reason=%r", request.method, trouble)
        message = f"the coordinator cannot answer now: {trouble}; try again later"
        return answer_refusal(request, UnavailableError("trouble", message))
    log.error("crashed method=%s path=%s", request.method, request.url.path, exc_info=error)
    return Response(Refusal("internal", "the coordinator failed; its log tells why"), status_code=500)


def _metrics(request: Request[Any, Any, Any]) -> Metrics:
    app_state: AppState = request.app.state.app_state
    return app_state.metrics


def _refuse(
    method: str, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> Response[Refusal]:
    log.info("refused method=%s code=%s status=%d", method, code, status)
    return Response(Refusal(code, message[:2000]), status_code=status, headers=headers)


#: Each route's access is stated by its router.
ROUTERS = (
    monitor_api.HEALTH,
    monitor_api.METRICS,
    device_api.ENROLMENT,
    device_api.ROUTER,
    admin_api.ROUTER,
    *sign_in.ROUTERS,
    *acts.ROUTERS,
    live.ROUTER,
)


def _report_crash(loop: asyncio.Task[None], app_state: AppState, on_crash: Callable[[], None]) -> None:
    if loop.cancelled():
        return
    app_state.ended_loops.append(loop.get_name())
    log.critical("loop_ended name=%s", loop.get_name(), exc_info=loop.exception())
    on_crash()
