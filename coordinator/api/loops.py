"""What goes on behind the requests: steps that are repeated for ever, and that wait while this machine is in trouble.

A full disk, a locked database or a lack of descriptors ends nothing: the step is tried again, and the log has one line
when the trouble begins and one when it is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from coordinator.storage.trouble import trouble_of

log = logging.getLogger("coordinator")

#: Pauses between attempts, which double from the first to the last.
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30.0


async def for_ever(name: str, step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step until it is cancelled, or raises what waiting does not cure."""
    while True:
        await patiently(name, step)


async def patiently(name: str, step: Callable[[], Awaitable[object]]) -> None:
    """Make a step, again and again while trouble of this machine prevents it.

    Args:
        name: name of the step, for the log.
        step: the step; one that raises must have changed nothing that it would not change again.
    """
    pause_s, attempts = FIRST_PAUSE_S, 0
    while True:
        try:
            await step()
        except Exception as error:
            trouble = trouble_of(error) or (str(error) if isinstance(error, OSError) else None)
            if trouble is None:
                raise
            attempts += 1
            if attempts == 1:
                log.warning(
                    "trouble where=%s reason=%r message='tried again until it succeeds'",
                    name,
                    trouble,
                )
        else:
            if attempts:
                log.warning("trouble_over where=%s attempts=%d", name, attempts)
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)
