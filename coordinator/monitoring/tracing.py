"""Traces of requests and aggregations by OpenTelemetry, where its own environment variables name a collector.

OpenTelemetry is an extra (``pip install 'edge-runtime[otel]'``): without the variables nothing of it is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from edge_runtime import __version__
from edge_runtime.errors import ConfigError

#: Either names the collector (OpenTelemetry's specification of exporters).
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DEFAULT_SERVICE_NAME = "edge-coordinator"

Attributes = Mapping[str, str | int]


class Tracing(Protocol):
    """Takes note of what has ended."""

    def ended(self, name: str, seconds: float, attributes: Attributes) -> None:
        """Note a span that ends now."""

    def close(self) -> None:
        """Send what waits."""


class NoTracing:
    """Nobody asked for traces."""

    def ended(self, name: str, seconds: float, attributes: Attributes) -> None:
        """Note nothing."""

    def close(self) -> None:
        """Do nothing."""


class OtlpTracing:
    """Spans sent in the background to the collector that the environment names; one that is away delays nothing."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - an extra

        name = os.environ.get("OTEL_SERVICE_NAME", DEFAULT_SERVICE_NAME)
        resource = Resource.create({SERVICE_NAME: name, "service.version": __version__})
        self._provider: Any = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(DEFAULT_SERVICE_NAME, __version__)

    def ended(self, name: str, seconds: float, attributes: Attributes) -> None:
        """Note a span that ends now."""
        now_ns = time.time_ns()
        span = self._tracer.start_span(
            name, start_time=now_ns - int(seconds * 1e9), attributes=dict(attributes)
        )
        span.end(now_ns)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def tracing_from_environment() -> Tracing:
    """Traces to the collector that the environment names, or none.

    Raises:
        ConfigError: the environment names one, and OpenTelemetry is not installed.
    """
    named = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if named is None:
        return NoTracing()
    try:
        return OtlpTracing()
    except ImportError as error:
        raise ConfigError(
            f"{named} is set, but OpenTelemetry is not installed: pip install 'edge-runtime[otel]', or unset it"
        ) from error
