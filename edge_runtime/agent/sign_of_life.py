"""While a device works on a task it says that it is there, so that its place need not wait until the deadline.

A thread sends the signs, as often as the coordinator asks for them, from the moment the task has come until its result
is delivered. It runs beside everything else: a sign that does not arrive is sent again at the next turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from edge_runtime.errors import CoordinatorError, RefusedError
from edge_runtime.log import note
from edge_runtime.protocol.messages import Standing

#: Bounds on the pause that a coordinator asks for.
SHORTEST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 3600.0


class SignOfLife:
    """Says again and again that a task is being worked on. Use as a context around the work.

    Args:
        say: call that tells the coordinator, and returns how the task stands.
        on_unwanted: function that is called once if nobody waits for the result any more; from another thread.
    """

    def __init__(self, say: Callable[[], Standing], on_unwanted: Callable[[], None]) -> None:
        self._say = say
        self._on_unwanted = on_unwanted
        self._ended = threading.Event()
        self._pause_s = LONGEST_PAUSE_S
        self._thread: threading.Thread | None = None
        #: Whether the coordinator said that nobody waits for the result any more.
        self.unwanted = False

    def __enter__(self) -> SignOfLife:
        """Say it once, and go on in a thread; a coordinator that asks for no signs gets no more."""
        if self._say_once():
            self._thread = threading.Thread(target=self._go_on, name="sign-of-life", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(SHORTEST_PAUSE_S)  # one that is sending may end later: it holds nothing

    def _go_on(self) -> None:
        while not self._ended.wait(self._pause_s):
            if not self._say_once():
                return

    def _say_once(self) -> bool:
        """Say it; False if there is no use in saying it again."""
        try:
            standing = self._say()
        except RefusedError:  # by a coordinator that does not know of signs
            return False
        except CoordinatorError:
            self._pause_s = min(self._pause_s, 30.0)
            return True
        self._pause_s = min(max(standing.again_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
        if not standing.wanted and not self._ended.is_set():
            self.unwanted = True
            note("task_unwanted", message="the coordinator waits for its result no more")
            self._on_unwanted()
            return False
        return standing.wanted
