"""Bytes of request and response bodies on the device API, attributed to the round in which they passed."""

from __future__ import annotations

import threading


class Traffic:
    """Bytes since the last :meth:`take`: the HTTP layer adds them, the loop that plays the rounds takes them."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._up_bytes = 0
        self._down_bytes = 0

    def add(self, *, up_bytes: int = 0, down_bytes: int = 0) -> None:
        """Count body bytes: up from devices, down to them."""
        with self._turn:
            self._up_bytes += up_bytes
            self._down_bytes += down_bytes

    def take(self) -> tuple[int, int]:
        """Counts (up, down) since the last call, which start again at zero."""
        with self._turn:
            counts = (self._up_bytes, self._down_bytes)
            self._up_bytes = self._down_bytes = 0
        return counts
