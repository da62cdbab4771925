"""Bodies of requests: bounded in size and time, in memory while they are small, on the disk beyond."""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.api import body as bodies
from coordinator.api.body import IN_MEMORY_BYTES, Body, announced_bytes, read_into
from coordinator.refusals import MalformedError, RefusalError, TooLargeError, TooSlowError

MIB = 1 << 20


class Connection:
    """The other side: it sends so many chunks of a size, with pauses, and then ends as it is told."""

    def __init__(self, chunks: int, size: int, *, pause_s: float = 0.0, breaks_off: bool = False) -> None:
        self.messages = self._messages(chunks, size, breaks_off)
        self.pause_s = pause_s

    @staticmethod
    def _messages(chunks: int, size: int, breaks_off: bool) -> Iterator[dict[str, Any]]:
        for index in range(chunks):
            yield {"type": "http.request", "body": bytes([index % 256]) * size, "more_body": True}
        if breaks_off:
            yield {"type": "http.disconnect"}
        yield {"type": "http.request", "body": b"", "more_body": False}

    async def receive(self) -> dict[str, Any]:
        """The next message (ASGI)."""
        await asyncio.sleep(self.pause_s)
        return next(self.messages)


def read(folder: Path, connection: Connection, limit: int) -> tuple[int, bytes, bytes]:
    """Size, sha256 and bytes of a body."""
    with Body(folder) as body:
        asyncio.run(read_into(body, connection.receive, limit))
        return body.size, body.sha256, body.read()


@pytest.mark.parametrize(("chunks", "size"), [(0, 1), (3, 10), (16, 65536), (17, 65536), (40, 65536)])
def test_a_body_is_read_as_it_came(tmp_path: Path, chunks: int, size: int) -> None:
    """In memory or on the disk, the bytes, their number and their sha256 are those that were sent; no file stays."""
    expected = b"".join(bytes([index % 256]) * size for index in range(chunks))
    found = read(tmp_path, Connection(chunks, size), 64 * MIB)
    assert found == (len(expected), hashlib.sha256(expected).digest(), expected)
    assert not list(tmp_path.iterdir())


def test_a_large_body_is_not_held_in_memory(tmp_path: Path) -> None:
    """While 32 MiB are read, no more memory is taken than for the first of them."""
    with Body(tmp_path) as body:
        tracemalloc.start()
        asyncio.run(read_into(body, Connection(512, 65536).receive, 64 * MIB))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (body.size, body.is_large) == (32 * MIB, True)
    assert peak_bytes < 4 * IN_MEMORY_BYTES


@pytest.mark.parametrize(
    ("connection", "error"),
    [
        (Connection(3, 1000), TooLargeError),
        (Connection(1, 100, breaks_off=True), MalformedError),
        (Connection(1, 100, pause_s=1.0), TooSlowError),
        (Connection(1000, 1, pause_s=0.02), TooSlowError),
    ],
    ids=["too large", "breaks off", "silent", "a byte at a time"],
)
def test_a_body_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connection: Connection, error: type[RefusalError]
) -> None:
    """A body that is too large, breaks off, falls silent or comes a byte at a time is refused, each by its name."""
    monkeypatch.setattr(bodies, "SILENCE_S", 0.2)
    with pytest.raises(error):
        read(tmp_path, connection, 2500)


@pytest.mark.parametrize("text", [b"-1", b"1e3", b"0x10", b"", b"9" * 5000, b"1, 1", "\u0661".encode()])
def test_an_announced_size_is_a_number(text: bytes) -> None:
    """What is announced and is no number of bytes is refused."""
    with pytest.raises(MalformedError):
        announced_bytes({"headers": [(b"content-length", text)]})
    assert announced_bytes({"headers": [(b"content-length", b"12")]}) == 12
    assert announced_bytes({"headers": []}) == 0
