"""While a task is trained, the device's conditions are looked at; where they turn bad, the worker is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from edge_runtime.agent.eligibility import Gate, Reason
from edge_runtime.log import warn

#: Seconds between two looks.
LOOK_EVERY_S = 15.0


class ConditionsWatch:
    """Looks at the conditions again and again. Use as a context around the work.

    Args:
        gate: what decides.
        stop: function that is called once if the work must stop; from another thread.
    """

    def __init__(self, gate: Gate, stop: Callable[[], None]) -> None:
        self._gate = gate
        self._stop = stop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="conditions", daemon=True)
        #: Why the work was stopped; None if it was not.
        self.reason: Reason | None = None

    def __enter__(self) -> ConditionsWatch:
        """Begin to look, unless nothing is asked of the conditions."""
        if self._gate.looks_at_work:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _go_on(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.reason = self._gate.reason_to_stop()
            if self.reason is not None:
                warn("work_stopped", reason=self.reason, message="the task goes on from here if it still can")
                self._stop()
                return
