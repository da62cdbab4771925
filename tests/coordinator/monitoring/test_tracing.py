"""Traces, as a collector gets them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from coordinator.monitoring.tracing import NoTracing, tracing_from_environment
from edge_runtime.errors import ConfigError
from tests.coordinator.conftest import World


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    posted: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        """Take a batch of spans."""
        self.posted.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collector that the environment names."""
    Collector.posted = []
    with HTTPServer(("127.0.0.1", 0), Collector) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{http.server_address[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        yield
        http.shutdown()
        thread.join()


def test_requests_and_aggregations_are_spans(collector: None, tmp_path: Path) -> None:
    """Each request is a span named by its route, each aggregation one with run and round; ids make no names."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    world = World(tmp_path)
    devices = world.fleet("ash", "birch", "cedar")
    run_id = world.create_run(rounds=1)
    world.work(devices)
    state = world.app.state.app_state
    state.note_aggregation(run_id, 0, 0.5)
    state.close()
    world.stores.storage.close()
    spans = [
        span
        for path, body in Collector.posted
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if path == "/v1/traces"
    ]
    names = {span.name for span in spans}
    assert {"POST /v1/check-in", "PUT /v1/tasks/{task_id}/result"} <= {
        name.replace(":str", "") for name in names
    }
    (aggregation,) = [span for span in spans if span.name == "aggregation"]
    assert aggregation.end_time_unix_nano - aggregation.start_time_unix_nano == 500_000_000
    attributes = {item.key: item.value for item in aggregation.attributes}
    assert attributes["edge.run_id"].string_value == run_id


def test_nobody_asked_for_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment's word nothing is noted."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert isinstance(tracing_from_environment(), NoTracing)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint without the extra stops the start with the command that cures it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'edge-runtime\[otel\]'"):
        tracing_from_environment()
