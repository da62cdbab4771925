"""A way to the coordinator that breaks off where it is told: in a request's head, in its body, before its last byte, or
before the answer.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Cut = Literal["head", "body", "last byte", "answer", "half of the answer"]
#: All places where a request can break off.
CUTS: tuple[Cut, ...] = ("head", "body", "last byte", "answer", "half of the answer")


class CuttingProxy:
    """Relays HTTP/1.1 requests one by one, and cuts the connection at some of them.

    Args:
        port: port of the coordinator on loopback.
        cuts: where to cut each request, in the order of their arrival; None lets one through, as all after the last.
    """

    def __init__(self, port: int, cuts: Iterable[Cut | None]) -> None:
        self._port = port
        self._cuts: Iterator[Cut | None] = iter(cuts)
        self._turn = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: First lines of the requests that came, and how many were cut.
        self.requests: list[str] = []
        self.cut = 0
        #: Bytes of bodies that the coordinator was sent.
        self.body_bytes = 0

    @property
    def url(self) -> str:
        """The address that clients use."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        """Accept connections until the listener is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _relay(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as server:
            incoming, answers = client.makefile("rb"), server.makefile("rb")
            while head := _head(incoming):
                body = incoming.read(_length(head))
                with self._turn:
                    self.requests.append(head.partition(b"\r\n")[0].decode())
                    cut = next(self._cuts, None)
                    self.cut += cut is not None
                if cut == "head":
                    server.sendall(head[: len(head) // 2])
                    return
                if cut in ("body", "last byte"):
                    sent = body[: len(body) // 2] if cut == "body" else body[:-1]
                    server.sendall(head + sent)
                    self.body_bytes += len(sent)
                    return
                server.sendall(head + body)
                self.body_bytes += len(body)
                answer = _head(answers)
                if cut == "answer" or not answer:
                    return
                content = answers.read(_length(answer))
                if cut == "half of the answer":
                    client.sendall(answer + content[: len(content) // 2])
                    return
                client.sendall(answer + content)


def _head(stream: object) -> bytes:
    """The lines up to the empty one; nothing at the end of the connection."""
    lines = []
    while line := stream.readline():  # type: ignore[attr-defined]
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def read_message(stream: object, *, to_head: bool = False) -> bytes:
    """A request or an answer, whole, to HEAD if need be; nothing at the end of the connection."""
    head = _head(stream)
    if to_head:
        return head
    return head + stream.read(_length(head)) if head else b""  # type: ignore[attr-defined,no-any-return]


def _length(head: bytes) -> int:
    size = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(size or 0)


@contextmanager
def cutting_proxy(port: int, cuts: Iterable[Cut | None] = ()) -> Iterator[CuttingProxy]:
    """A proxy that serves in a thread until the end of the block."""
    proxy = CuttingProxy(port, cuts)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
