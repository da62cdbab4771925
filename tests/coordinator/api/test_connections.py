"""Connections on real sockets: how many there may be, and how long headers and bodies may take."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from coordinator.api import body, connections, serve
from coordinator.api.serve import CoordinatorServer, ServeOptions, bind

SHORT_S = 1.0
MOST = 8
OK = b'{"status":"ok"}'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CoordinatorServer]:
    """A coordinator on a free port with short patience and room for few connections."""
    monkeypatch.setattr(connections, "HEADERS_S", SHORT_S)
    monkeypatch.setattr(body, "SILENCE_S", SHORT_S)
    monkeypatch.setattr(serve, "most_connections", lambda: MOST)
    server = bind(ServeOptions(tmp_path / "state", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join()


def connect(server: CoordinatorServer) -> socket.socket:
    """A connection to it."""
    parts = urlsplit(server.url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=20)


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    """What comes until it ends so; less if the other side closes."""
    received = b""
    while not received.endswith(end) and (chunk := connection.recv(65536)):
        received += chunk
    return received


def ask(server: CoordinatorServer) -> bytes:
    """The answer to a small request on a connection of its own."""
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return answer_of(connection)


def drip(connection: socket.socket, data: bytes) -> None:
    """Send a byte at a time, until the other side has had enough."""
    for index in range(len(data)):
        try:
            connection.sendall(data[index : index + 1])
        except ConnectionError:
            return
        time.sleep(0.05)


def test_headers_that_dawdle_are_cut_off(server: CoordinatorServer) -> None:
    """Headers that come a byte at a time, never, or after an earlier request was answered, end with the connection."""
    with connect(server) as slow, connect(server) as silent, connect(server) as second:
        second.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive_until(second, OK).startswith(b"HTTP/1.1 200")
        drip(slow, b"GET /healthz HTTP/1.1\r\n" + b"X-Slow: yes\r\n" * 100)
        assert answer_of(slow) == b""
        assert answer_of(silent) == b""
        drip(second, b"GET /healthz HTTP/1.1\r\n" + b"X-Slow: yes\r\n" * 100)
        assert answer_of(second) == b""
    assert ask(server).startswith(b"HTTP/1.1 200")


def test_bodies_that_dawdle_are_cut_off(server: CoordinatorServer) -> None:
    """A body that stops coming is answered with 408 and the connection closed."""
    with connect(server) as slow:
        slow.sendall(b"POST /v1/devices/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        received = answer_of(slow)
    assert received.startswith(b"HTTP/1.1 408")
    assert b"too_slow" in received


def test_headers_are_bounded(server: CoordinatorServer) -> None:
    """Headers over their limit are refused without being kept."""
    with connect(server) as greedy:
        head = b"GET /healthz HTTP/1.1\r\nX-Long: " + b"x" * (connections.MAX_HEADER_BYTES + 4096)
        greedy.sendall(head)
        assert answer_of(greedy).startswith(b"HTTP/1.1 4")
    assert ask(server).startswith(b"HTTP/1.1 200")


def test_idle_strangers_give_way(server: CoordinatorServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more connections than there may be, those that waited longest are closed, and whoever asks is answered."""
    monkeypatch.setattr(connections, "HEADERS_S", 60.0)
    with ExitStack() as stack:
        strangers = [stack.enter_context(connect(server)) for _ in range(5 * MOST)]
        for _ in range(3):
            assert ask(server).startswith(b"HTTP/1.1 200")
        assert answer_of(strangers[0]) == b""


def test_two_requests_at_once_are_both_answered(server: CoordinatorServer) -> None:
    """Requests sent without waiting for answers are answered in turn, and none is taken for late headers."""
    with connect(server) as connection:
        one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.sendall(one * 3)
        received = b""
        while received.count(OK) < 3:
            received += connection.recv(65536)
        time.sleep(SHORT_S / 2)
        connection.sendall(one)
        assert receive_until(connection, OK).startswith(b"HTTP/1.1 200")
