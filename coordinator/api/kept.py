"""What takes a look at every device is made once for all who ask within a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

#: How old it may be.
KEPT_S = 2.0


class Kept:
    """The last answer to a dear question."""

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._made_s: float | None = None
        self._answer: dict[str, Any] = {}

    async def get(self, now_s: float, make: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """The answer, made anew unless it is younger than :data:`KEPT_S`; those who ask meanwhile wait for it."""
        async with self._asking:
            if self._made_s is None or not 0 <= now_s - self._made_s < KEPT_S:
                self._answer = await make()
                self._made_s = now_s
            return self._answer
