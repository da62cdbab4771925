"""How often somebody may try to sign in with a password: each name pauses for longer and longer after failures.

Pauses are by name, not by address, which a proxy hides; whoever is kept out by somebody else's attempts signs in with a
token, which nobody can guess and nothing bounds.
"""

from __future__ import annotations

from collections import OrderedDict

#: Failures in a row that cost nothing; then each doubles the pause, from the first to the last.
FREE = 5
FIRST_PAUSE_S, LAST_PAUSE_S = 2.0, 300.0
#: Names that are remembered, those of the newest failures.
MOST_NAMES = 10_000


class Attempts:
    """Failures to sign in since the last success, by name; they are forgotten when the coordinator ends."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def pause_s(self, name: str, now_s: float) -> float:
        """Seconds until a name may be tried again; 0 if it may be now."""
        count, last_s = self._failed.get(name, (0, 0.0))
        if count < FREE:
            return 0.0
        pause_s: float = min(FIRST_PAUSE_S * 2.0 ** min(count - FREE, 30), LAST_PAUSE_S)
        return max(0.0, last_s + pause_s - now_s)

    def fail(self, name: str, now_s: float) -> None:
        """Count a failure."""
        count, _ = self._failed.pop(name, (0, 0.0))
        self._failed[name] = (count + 1, now_s)
        if len(self._failed) > MOST_NAMES:
            self._failed.popitem(last=False)

    def succeed(self, name: str) -> None:
        """Forget the failures of a name."""
        self._failed.pop(name, None)
