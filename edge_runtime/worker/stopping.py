"""A worker that is told to stop does so after its present step, instead of at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: A service manager sends the first to every process of a service, a terminal the second.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Within the block these signals are noted; the function says whether one came."""
    told = False

    def note(_: int, __: FrameType | None) -> None:
        nonlocal told
        told = True

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
