"""What monitoring asks: whether the process lives, whether it can work, and its metrics."""

from __future__ import annotations

import asyncio
from functools import partial

from litestar import Response, Router, get
from litestar.di import NamedDependency

from coordinator.api.access import ACCESS, Access
from coordinator.api.app_state import AppState
from coordinator.monitoring.metrics import CONTENT_TYPE
from coordinator.monitoring.readiness import Readiness, readiness
from coordinator.rounds.presence import SLACK_S
from coordinator.storage.monitor_rows import figures


@get("/healthz", sync_to_thread=False)
def health() -> dict[str, str]:
    """Tell anybody that the process serves, and nothing else."""
    return {"status": "ok"}


@get("/readyz")
async def ready(app_state: NamedDependency[AppState]) -> Response[Readiness]:
    """Tell anybody whether requests can be served now: 503 where something stands in the way, with what it is."""
    found = await asyncio.to_thread(readiness, app_state.stores, app_state.ended_loops)
    return Response(found, status_code=503 if found.reasons else 200)


@get("/")
async def metrics(app_state: NamedDependency[AppState]) -> Response[bytes]:
    """Metrics in Prometheus' text format."""
    told = await app_state.read(partial(figures, now_s=app_state.clock(), slack_s=SLACK_S))
    sizes_bytes = await asyncio.to_thread(app_state.stores.storage.sizes_bytes)
    text = app_state.metrics.text(told, waiting=app_state.waiting, database_bytes=sizes_bytes)
    return Response(text, media_type=CONTENT_TYPE)


HEALTH = Router("/", route_handlers=[health, ready], opt={ACCESS: Access.ANYBODY})
METRICS = Router("/metrics", route_handlers=[metrics], opt={ACCESS: Access.MONITOR}, tags=["monitoring"])
