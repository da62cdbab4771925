"""What the service manager that started the agent is told: that it serves, that it lives, and that it stops.

The messages are those of sd_notify(3): datagrams to the socket that ``NOTIFY_SOCKET`` names. Where a watchdog is set
(``WatchdogSec=`` of the unit), the agent's own loops feed it, no thread beside them: an agent that hangs is then killed
and started again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

from edge_runtime.log import warn

#: Signs of life in the time after which the service manager gives up.
SIGNS_IN_A_PERIOD = 4


class ServiceManager:
    """The service manager of this process; without one, telling it does nothing.

    Args:
        environment: variables that the service manager has set; None takes this process's.
        clock: source of seconds that do not jump.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        environment = os.environ if environment is None else environment
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self._clock = clock
        self._next_sign_s = 0.0
        #: Longest pause between two signs of life, in seconds; None if no watchdog waits for them.
        self.pause_s = _pause_s(environment) if self._address else None

    def ready(self) -> None:
        """Say that the agent serves."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """Say that the agent stops."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog; called as often as one likes, it says so as often as is needed."""
        if self.pause_s is None:
            return
        now_s = self._clock()
        if now_s >= self._next_sign_s:
            self._next_sign_s = now_s + self.pause_s
            self._tell("WATCHDOG=1")

    def wait(self, seconds: float, sleep: Callable[[float], None]) -> None:
        """Sleep, feeding the watchdog.

        Args:
            seconds: how long.
            sleep: function that sleeps.
        """
        while self.pause_s is not None and seconds > self.pause_s:
            self.alive()
            sleep(self.pause_s)
            seconds -= self.pause_s
        self.alive()
        sleep(seconds)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.sendto(state.encode(), self._address)
        except OSError as error:
            warn("service_manager_unreachable", state=state, error=error)


def _pause_s(environment: Mapping[str, str]) -> float | None:
    """Pause between signs of life, from what sd_watchdog_enabled(3) looks at; None if no watchdog is meant."""
    microseconds, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0 or process not in {"", str(os.getpid())}:
        return None
    return int(microseconds) / 1e6 / SIGNS_IN_A_PERIOD
