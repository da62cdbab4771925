"""Predictions over HTTP: to this machine alone, bounded, by one worker that is replaced when it ends."""

from __future__ import annotations

import http.client
import json
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.serving.http_server import (
    PredictionServer,
    Served,
    listen_on_port,
    listen_on_socket,
)
from edge_runtime.serving.source import Model
from edge_runtime.worker.inference_jobs import MAX_REQUEST_BYTES

JSON = {"Content-Type": "application/json"}


class Current:
    """The model to serve; tests put another in its place."""

    def __init__(self, model: Model) -> None:
        self.model, self.release = model, "1"

    def __call__(self) -> tuple[Model, str]:
        return self.model, self.release


@contextmanager
def serving(listener: socket.socket, current: Current) -> Iterator[tuple[Any, Served]]:
    """A server in a thread."""
    served = Served(current)
    served.open()
    with PredictionServer(listener, served) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield listener.getsockname(), served
        finally:
            server.shutdown()
            served.close()


@pytest.fixture(scope="module")
def current(language_model: Model) -> Current:
    """The language model that was written by hand."""
    return Current(language_model)


@pytest.fixture(scope="module")
def server(current: Current):
    """It, served on a free port."""
    with serving(listen_on_port("127.0.0.1", 0), current) as (address, served):
        yield address, served


def ask(
    address: tuple[str, int], method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, JSON if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_a_text_streams_as_lines_of_json(server) -> None:
    """Pieces come as a chunked stream, and the end says why."""
    status, headers, body = ask(
        server[0], "POST", "/v1/predict", {"text": "the cat", "sampling": {"max_tokens": 3}}
    )
    assert (status, headers["Content-Type"]) == (200, "application/x-ndjson")
    lines = [json.loads(line) for line in body.splitlines()]
    assert [line["type"] for line in lines] == ["piece", "piece", "piece", "finished"]
    assert lines[-1]["reason"] == "length"


def test_a_label_comes_as_one_object(classifier: Model) -> None:
    """A classifier answers with its label and the probability of each."""
    with serving(listen_on_port("127.0.0.1", 0), Current(classifier)) as (address, _):
        status, _, body = ask(address, "POST", "/v1/predict", {"text": "a dull plot"})
        found = json.loads(body)
        assert (status, set(found["probabilities"])) == (200, set(classifier.package.manifest.labels))
        assert max(found["probabilities"], key=found["probabilities"].get) == found["label"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        ({"text": "a"}, {}, 415, "content_type"),
        (b"{", JSON, 400, "malformed"),
        (b'{"text": "\xff"}', JSON, 400, "malformed"),
        (b'{"other": ' + b"[" * 100_000, JSON, 400, "malformed"),
        ({"text": ""}, JSON, 400, "malformed"),
        ({"text": "a", "temperature": 1}, JSON, 400, "malformed"),
        ({"text": "a", "sampling": {"top_p": 2}}, JSON, 400, "malformed"),
        (b"", {**JSON, "Content-Length": str(MAX_REQUEST_BYTES + 1)}, 413, "too_large"),
        (b"", {**JSON, "Content-Length": "many"}, 411, "length_required"),
        ({"text": "a"}, {**JSON, "Host": "example.org"}, 403, "host"),
        ({"text": "home " * 40}, JSON, 422, "DataError"),
    ],
)
def test_what_is_no_request_is_refused(
    server, body: Any, headers: dict[str, str], status: int, code: str
) -> None:
    """Each has its status and code, quotes nothing, and the next request is answered."""
    found, _, answer = ask(server[0], "POST", "/v1/predict", body, headers)
    assert (found, json.loads(answer)["code"]) == (status, code)
    assert b"home" not in answer
    assert ask(server[0], "GET", "/health")[0] == 200


def test_the_api_describes_itself(server) -> None:
    """The document names both requests and their messages; the page shows them and loads nothing."""
    status, _, body = ask(server[0], "GET", "/openapi.json")
    document = json.loads(body)
    assert (status, set(document["paths"])) == (200, {"/v1/predict", "/health"})
    assert {"PredictRequest", "Classified", "Health"} <= set(document["components"]["schemas"])
    status, headers, page = ask(server[0], "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"/v1/predict" in page
    assert b"://" not in page
    assert ask(server[0], "GET", "/other")[0] == 404


def test_a_client_that_leaves_frees_the_worker(server) -> None:
    """Whoever hangs up in mid-text does not keep the next one waiting."""
    with socket.create_connection(server[0]) as client:
        body = b'{"text": "the cat"}'
        client.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
    assert ask(server[0], "POST", "/v1/predict", {"text": "the dog"})[0] == 200


def test_a_worker_that_died_is_replaced(server) -> None:
    """The request that meets its end fails or is served by a new one; the next is answered."""
    _, served = server
    served._session._worker.process.kill()
    served._session._worker.process.wait()
    assert json.loads(ask(server[0], "GET", "/health")[2])["status"] == "stopped"
    assert ask(server[0], "POST", "/v1/predict", {"text": "the dog"})[0] == 200
    assert json.loads(ask(server[0], "GET", "/health")[2])["status"] == "ready"


def test_a_new_release_is_served_from_the_next_request_on(server, current: Current, tmp_path: Path) -> None:
    """Other values in the release's place start another worker; the same ones do not."""
    address, served = server
    before = served._session
    ask(address, "POST", "/v1/predict", {"text": "the dog"})
    assert served._session is before
    copied = tmp_path / "newer.safetensors"
    copied.write_bytes(current.model.state_path.read_bytes())
    current.model, current.release = replace(current.model, state_path=copied), "2"
    assert ask(address, "POST", "/v1/predict", {"text": "the dog"})[0] == 200
    assert json.loads(ask(address, "GET", "/health")[2])["release"] == "2"
    assert served._session is not before
    assert not before.alive


def test_a_unix_socket_is_its_owners_alone(current: Current, tmp_path: Path) -> None:
    """Its mode is 0600; a second server on it is refused, and one that ended leaves no obstacle."""
    path = tmp_path / "predict.sock"
    with serving(listen_on_socket(path), current):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match="another server listens there"):
            listen_on_socket(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: anything\r\nConnection: close\r\n\r\n")
            assert client.recv(64).startswith(b"HTTP/1.1 200")
    listen_on_socket(path).close()


def test_only_this_machine_is_served(tmp_path: Path) -> None:
    """Other addresses, and files in the socket's place, are refused with what to do."""
    with pytest.raises(ConfigError, match="served to this machine alone"):
        listen_on_port("0.0.0.0", 0)  # noqa: S104 - the address that is refused
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="there is a file of that name"):
        listen_on_socket(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="name another place"):
        listen_on_socket(tmp_path / "nowhere" / "predict.sock")
    with listen_on_port("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="name another one"):
        listen_on_port("127.0.0.1", taken.getsockname()[1])
