"""Attempts to sign in: how long a name pauses after failures."""

from __future__ import annotations

from coordinator.api.attempts import FREE, LAST_PAUSE_S, MOST_NAMES, Attempts


def test_pauses_grow_and_end() -> None:
    """The first failures cost nothing, each later one doubles the pause up to its bound, and a success forgets all."""
    attempts, now_s = Attempts(), 1000.0
    for _ in range(FREE):
        assert attempts.pause_s("ann", now_s) == 0
        attempts.fail("ann", now_s)
    assert attempts.pause_s("ann", now_s) == 2
    assert attempts.pause_s("bob", now_s) == 0
    attempts.fail("ann", now_s)
    assert attempts.pause_s("ann", now_s + 1) == 3
    for _ in range(100):
        attempts.fail("ann", now_s)
    assert attempts.pause_s("ann", now_s) == LAST_PAUSE_S
    attempts.succeed("ann")
    assert attempts.pause_s("ann", now_s) == 0


def test_names_that_are_remembered_are_bounded() -> None:
    """However many names a stranger tries, so many are remembered, those of the newest failures."""
    attempts = Attempts()
    for number in range(MOST_NAMES + 5):
        for _ in range(FREE):
            attempts.fail(str(number), 0.0)
    assert attempts.pause_s("0", 0.0) == 0
    assert attempts.pause_s(str(MOST_NAMES + 4), 0.0) > 0
