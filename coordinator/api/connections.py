"""Bounds on connections, before a request is there to be judged: how many, how long headers may take, and how large.

uvicorn has a limit on connections that refuses new ones, so idle strangers would keep devices out; and none on how long
headers take, or, with the parser in C, how large they are. Here the connection that has waited longest without a
request gives way to a new one, headers must be complete within :data:`HEADERS_S` of connecting, or of their first byte
where an earlier request was answered before, and they may have :data:`MAX_HEADER_BYTES`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger("coordinator")

#: Time in which headers must be complete.
HEADERS_S = 20.0
MAX_HEADER_BYTES = 16 << 10
#: Descriptors that connections leave for the database, files and workers.
RESERVED_DESCRIPTORS = 128
MOST_CONNECTIONS = 16_384
#: Connections taken from the queue before those there are too many of are closed; asyncio calls this number a backlog.
ACCEPTED_AT_ONCE = 32
#: Connections that the system queues until they are accepted.
QUEUE = 4096


class Connections:
    """The open connections, and those of them that wait for a request, the longest waiting first.

    Args:
        most: most connections at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[BoundedProtocol] = set()
        self._idle: dict[BoundedProtocol, None] = {}

    def add(self, connection: BoundedProtocol) -> None:
        """Take in a new connection. If there are too many, the longest idle one is closed; this one if none is idle."""
        if len(self._open) >= self.most:
            log.warning("connections_full most=%d", self.most)
            oldest = next(iter(self._idle), connection)
            oldest.give_way()
            if oldest is connection:
                return
            self.discard(oldest)
        self._open.add(connection)
        self._idle[connection] = None

    def mark_busy(self, connection: BoundedProtocol) -> None:
        """A connection has a request."""
        self._idle.pop(connection, None)

    def mark_idle(self, connection: BoundedProtocol) -> None:
        """A connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def discard(self, connection: BoundedProtocol) -> None:
        """A connection has ended."""
        self._open.discard(connection)
        self._idle.pop(connection, None)


class HeadersTooLargeError(Exception):
    """A request's first line and headers exceed :data:`MAX_HEADER_BYTES`; the parser answers 400 and closes."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with limits on the time that headers take, and on their size.

    Args:
        connections: all connections of the server.
        arguments: what uvicorn gives its protocols.
    """

    def __init__(self, *, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all = connections
        self._headers_due: asyncio.TimerHandle | None = None
        #: Bytes of a head that is not complete, and of what the parser has told of a head.
        self._unfinished_bytes = self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for headers (asyncio)."""
        super().connection_made(transport)
        self._expect_headers()
        self._all.add(self)

    def data_received(self, data: bytes) -> None:
        """Take bytes in (asyncio)."""
        self._unfinished_bytes += len(data)
        super().data_received(data)
        if self._has_request():
            self._unfinished_bytes = 0
            self._cancel_headers_due()
            self._all.mark_busy(self)
        elif self._unfinished_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("Headers are too large.")
        elif self._headers_due is None and not self.transport.is_closing():
            self._expect_headers()

    def on_message_begin(self) -> None:
        """A request begins (parser)."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the first line (parser)."""
        self._take_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header (parser)."""
        self._take_head(len(name) + len(value))
        super().on_header(name, value)

    def on_response_complete(self) -> None:
        """Wait for the next request on this connection (uvicorn)."""
        super().on_response_complete()
        if self._has_request():  # it was sent before this one was answered
            self._cancel_headers_due()
        else:
            self._all.mark_idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection (asyncio)."""
        self._cancel_headers_due()
        self._all.discard(self)
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Close a connection that has no request."""
        self._cancel_headers_due()
        self.transport.abort()

    def _take_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEADER_BYTES:
            raise HeadersTooLargeError

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADERS_S, self._headers_late)

    def _headers_late(self) -> None:
        log.info("headers_late seconds=%.0f", HEADERS_S)
        self.give_way()

    def _cancel_headers_due(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


class Listener(socket.socket):
    """A listening socket with a queue of :data:`QUEUE`, however few connections are accepted at once."""

    def listen(self, backlog: int = QUEUE, /) -> None:
        """Listen, with a long queue."""
        super().listen(max(backlog, QUEUE))

    @classmethod
    def of(cls, listener: socket.socket) -> Listener:
        """Take over a socket that is bound."""
        return cls(listener.family, listener.type, listener.proto, fileno=listener.detach())


def most_connections() -> int:
    """How many connections this process may have, after its limit of descriptors was raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + RESERVED_DESCRIPTORS
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MOST_CONNECTIONS, soft - RESERVED_DESCRIPTORS))
