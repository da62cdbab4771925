"""Whether something has happened that pages show: one look at the database serves all who ask in the same second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from coordinator.storage import fleet_rows
from coordinator.storage.connection import Connection

Read = Callable[[Callable[[Connection], str]], Awaitable[str]]
#: Time from one look to the next.
LOOK_S = 1.0


class Changes:
    """What the streams share: a number that grows whenever something has happened."""

    def __init__(self) -> None:
        self.number = 0
        self.streams = 0
        self._seen = ""
        self._looked_s = -LOOK_S
        self._looking = asyncio.Lock()

    async def look(self, read: Read) -> int:
        """Look for changes, unless somebody has just done so; the number as it is then."""
        async with self._looking:
            loop_s = asyncio.get_running_loop().time()
            if loop_s - self._looked_s >= LOOK_S:
                self._looked_s = loop_s
                found = await read(fleet_rows.fingerprint)
                self.number += found != self._seen
                self._seen = found
        return self.number
