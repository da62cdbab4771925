"""A TCP relay that keeps what passes through it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Recorder:
    """Listens on a free port of loopback, relays to another, and records both directions.

    ``up`` and ``down`` hold one chunk of bytes for each connection; read them after :meth:`close`.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.up: list[bytearray] = []
        self.down: list[bytearray] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self) -> None:
        """Close all connections and wait for the relaying to end."""
        for end in [self._listener, *self._sockets]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in [self._listener, *self._sockets]:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
                coordinator = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                return
            self._sockets += [device, coordinator]
            for source, sink, records in ((device, coordinator, self.up), (coordinator, device, self.down)):
                record = bytearray()
                records.append(record)
                self._start(_relay, source, sink, record)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()


def _relay(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with suppress(OSError):
        while chunk := source.recv(1 << 16):
            record += chunk
            sink.sendall(chunk)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
