"""Time that does not jump: the wall clock at the start, and from then on what a monotonic clock counts.

Deadlines and windows go by it, so setting the machine's clock holds no place and loses none. Between two starts of the
coordinator there is only the wall clock: :func:`coordinator.rounds.state_machine.resume` forgives what happened to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: A difference that adjusting a clock by and by does not make within a run of the coordinator's loop.
STEP_S = 5.0


class SteadyClock:
    """Seconds since 1970, as this process has counted them since its start.

    Args:
        wall: the machine's clock, in seconds since 1970.
        monotonic: a clock that nobody can set, in seconds.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        self._offset_s = wall() - monotonic()

    def __call__(self) -> float:
        """The present moment."""
        return self._monotonic() + self._offset_s


class StepWatch:
    """Notices when the wall clock is set.

    Args:
        steady: time that does not jump.
        wall: the machine's clock.
    """

    def __init__(self, steady: Callable[[], float], wall: Callable[[], float]) -> None:
        self._steady, self._wall = steady, wall
        self._apart_s = wall() - steady()

    def step_s(self) -> float:
        """By how much the clock was set since this was last asked, forward or back; 0 if it was not."""
        apart_s = self._wall() - self._steady()
        step_s = apart_s - self._apart_s
        self._apart_s = apart_s
        return step_s if abs(step_s) >= STEP_S else 0.0
