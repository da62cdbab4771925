"""A way to an S3 server that answers badly on demand: with errors, not at all, or with other bytes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

from tests.faults.cutting_proxy import read_message

Mood = Literal["well", "errors", "silence", "other bytes", "closed"]
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class BadStorage:
    """Relays requests to an S3 server, or answers as its mood is."""

    def __init__(self, address: str) -> None:
        self.mood: Mood = "well"
        #: Heads of the requests that came.
        self.requests: list[str] = []
        self._parts = urlsplit(address)
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections, and let go of those that wait."""
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            incoming = client.makefile("rb")
            while request := read_message(incoming):
                self.requests.append(request.partition(b"\r\n\r\n")[0].decode("latin-1"))
                if self.mood == "closed":
                    return
                if self.mood == "silence":
                    self._over.wait()
                    return
                if self.mood == "errors":
                    client.sendall(ERROR)
                    return
                with socket.create_connection((self._parts.hostname or "", self._parts.port or 80)) as server:
                    server.sendall(request)
                    head, split, body = read_message(
                        server.makefile("rb"), to_head=request.startswith(b"HEAD")
                    ).partition(b"\r\n\r\n")
                if self.mood == "other bytes" and request.startswith(b"GET") and b"/blobs/" in request[:200]:
                    body = bytes(len(body))
                client.sendall(head + split + body)


@contextmanager
def bad_storage(address: str) -> Iterator[BadStorage]:
    """Such a way, until the end of the block; it begins well."""
    storage = BadStorage(address)
    try:
        yield storage
    finally:
        storage.close()
