"""Arms that take turns, so that a busy machine disturbs them alike and ratios can be taken within a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

#: What one arm gave in one turn, by what was measured.
Readings = dict[str, float]


def take_turns(
    arms: Mapping[str, Callable[[], Readings | None]], repetitions: int, *, warm_up: bool = False
) -> dict[str, list[Readings]]:
    """Run every arm once a turn, in the order given.

    Args:
        arms: for each name the function that runs the arm once; None from it means that this turn gave no readings.
        repetitions: number of turns that count.
        warm_up: whether a turn that does not count comes first, to fill the page cache.

    Returns:
        The readings of each arm, one for each turn that gave some; an empty list for an arm that never did.
    """
    turns: dict[str, list[Readings]] = {name: [] for name in arms}
    for turn in range(0 if warm_up else 1, repetitions + 1):
        print(f"Turn {turn} of {repetitions}" if turn else "Warming up", flush=True)
        for name, run in arms.items():
            readings = run()
            if turn and readings is not None:
                turns[name].append(readings)
    return turns
