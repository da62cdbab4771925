"""``/live``: tells pages by server-sent events that something has happened; what it was they fetch themselves.

One look at the database serves all pages that listen, and there is none while nobody does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from litestar import Request, Router, get
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.response import ServerSentEvent, ServerSentEventMessage

from coordinator import accounts
from coordinator.api.access import ACCESS, PAGE, Access
from coordinator.api.app_state import AppState
from coordinator.api.changes import LOOK_S, Changes
from coordinator.api.middleware import COOKIE
from coordinator.refusals import UnavailableError

#: Time from one sign of life of a stream to the next.
PING_S = 15.0
#: Streams at once: each holds a connection.
MOST_STREAMS = 100


@get("/live")
async def live(request: Request[None, None, State], app_state: NamedDependency[AppState]) -> ServerSentEvent:
    """A stream of ``changed``, and ``ended`` when the session is over."""
    changes: Changes = app_state.changes
    if changes.streams >= MOST_STREAMS:
        raise UnavailableError("trouble", f"{MOST_STREAMS} pages are kept up to date already; close some")
    return ServerSentEvent(
        _stream(changes, app_state, request.cookies.get(COOKIE, "")),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(
    changes: Changes, app_state: AppState, cookie: str
) -> AsyncIterator[ServerSentEventMessage]:
    changes.streams += 1
    try:
        seen = await changes.look(app_state.read)
        pinged_s = 0.0
        while True:
            now_s = asyncio.get_running_loop().time()
            if now_s - pinged_s >= PING_S:
                pinged_s = now_s
                session = await app_state.read(
                    lambda connection: accounts.find_session(
                        connection, cookie, app_state.admin_token, now_s=app_state.clock()
                    )
                )
                if session is None:
                    yield ServerSentEventMessage(event="ended", data="sign in again")
                    return
                yield ServerSentEventMessage(comment="still here")
            found = await changes.look(app_state.read)
            if found != seen:
                seen = found
                yield ServerSentEventMessage(event="changed", data=str(found))
            await asyncio.sleep(LOOK_S)
    finally:
        changes.streams -= 1


ROUTER = Router("/", route_handlers=[live], opt={ACCESS: Access.VIEWER, PAGE: True}, include_in_schema=False)
