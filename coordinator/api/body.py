"""A request's body, read within bounds of size and time: small ones in memory, others on the disk."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from coordinator.refusals import MalformedError, TooLargeError, TooSlowError

# The interface as the ASGI specification has it: open dictionaries.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

#: A body up to this size is held in memory.
IN_MEMORY_BYTES = 1 << 20
#: What a large body is read back in.
PIECE_BYTES = 256 << 10
#: Longest silence within a body.
SILENCE_S = 30.0
#: A body must come faster than this, on the whole, once :data:`SILENCE_S` have passed.
LEAST_BYTES_PER_S = 1024


class Body:
    """A body that was read. Use as a context: its file goes with it.

    Args:
        folder: folder for what memory shall not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - see close

    @property
    def sha256(self) -> bytes:
        """The sha256 of what was read, 32 bytes."""
        return self._sha256.digest()

    @property
    def is_large(self) -> bool:
        """Whether it lies on the disk."""
        return self.size > IN_MEMORY_BYTES

    async def add(self, chunk: bytes) -> None:
        """Take in the next bytes.

        Raises:
            OSError: the disk is full.
        """
        self.size += len(chunk)
        self._sha256.update(chunk)
        if self.is_large:
            await asyncio.to_thread(self._file.write, chunk)
        else:
            self._file.write(chunk)

    def read(self) -> bytes:
        """All of it."""
        self._file.seek(0)
        data: bytes = self._file.read()
        return data

    def pieces(self) -> Iterator[bytes]:
        """All of it, piece by piece."""
        self._file.seek(0)
        while piece := self._file.read(PIECE_BYTES):
            yield piece

    def close(self) -> None:
        """Give up memory or disk space."""
        self._file.close()

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def announced_bytes(scope: Scope) -> int:
    """The size that a request announces for its body; 0 if it announces none.

    Raises:
        MalformedError: ``malformed``, it is no number.
    """
    text = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not text.isdigit() or len(text) > 18:
        raise MalformedError("malformed", "Content-Length is no number of bytes")
    return int(text)


def check_size(size: int, limit: int) -> None:
    """Refuse a body over its limit with ``too_large``."""
    if size > limit:
        raise TooLargeError("too_large", f"the body exceeds the limit of {limit} bytes")


async def read_into(body: Body, receive: Receive, limit: int) -> None:
    """Read a request's body.

    Args:
        body: empty body that takes it.
        receive: the connection, as ASGI has it.
        limit: most bytes.

    Raises:
        TooLargeError: ``too_large``.
        TooSlowError: ``too_slow``, it dawdles.
        MalformedError: ``malformed``, the connection closed early.
        OSError: the disk is full.
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while True:
        left_s = started_s + SILENCE_S + body.size / LEAST_BYTES_PER_S - loop.time()
        try:
            async with asyncio.timeout(min(left_s, SILENCE_S)):
                message = await receive()
        except TimeoutError as error:
            raise TooSlowError(
                "too_slow",
                f"the body came slower than {LEAST_BYTES_PER_S} bytes a second, or nothing for {SILENCE_S:.0f} s;"
                " try again on a better line",
            ) from error
        if message["type"] != "http.request":
            raise MalformedError("malformed", "the connection closed before the body was complete")
        chunk: bytes = message.get("body", b"")
        check_size(body.size + len(chunk), limit)
        await body.add(chunk)
        if not message.get("more_body", False):
            return
