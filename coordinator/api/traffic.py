"""Bytes of request and response bodies on the device API, attributed to the round in which they passed."""

from __future__ import annotations

import threading


class Traffic:
    """Bytes since the last :meth:`take`: the HTTP layer adds them, the loop that plays the rounds takes them."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._passed: dict[str, tuple[int, int]] = {}

    def add(self, device_id: str, *, up_bytes: int = 0, down_bytes: int = 0) -> None:
        """Count body bytes of a device, up from it and down to it; the empty name stands for whoever is not known."""
        with self._turn:
            up, down = self._passed.get(device_id, (0, 0))
            self._passed[device_id] = (up + up_bytes, down + down_bytes)

    def take(self) -> dict[str, tuple[int, int]]:
        """Bytes up and down by device since the last call, which start again at zero."""
        with self._turn:
            passed, self._passed = self._passed, {}
        return passed
