"""Times of a block: taken again while they cannot be true, and never such that more work takes less time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.execution.calibration import CALIBRATION_TRIES, settle
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.prepared import Calibration
from tests.edge_runtime.packages import make_manifest

SECONDS = st.floats(1e-4, 10.0)


def measured(*figures: tuple[float, float, float]) -> tuple[tuple[tuple[float, float, float], bool], int]:
    """What settles from these figures, one after the other, and how many were asked for."""
    asked = 0

    def measure() -> tuple[float, float, float]:
        nonlocal asked
        asked += 1
        return figures[asked - 1]

    return settle(measure), asked


def test_times_that_can_be_true_are_taken_at_once() -> None:
    """A dual program that takes twice its primal is believed."""
    assert measured((1.0, 2.1, 4.8)) == (((1.0, 2.1, 4.8), False), 1)


def test_a_dual_faster_than_its_primal_is_timed_again() -> None:
    """The primal was disturbed: the shortest time of each over both tries can be true."""
    assert measured((3.0, 2.1, 4.8), (1.0, 2.4, 5.0)) == (((1.0, 2.1, 4.8), False), 2)


def test_a_dual_many_times_its_primal_is_timed_again() -> None:
    """A dual program that takes twenty times its primal was disturbed itself."""
    assert measured((1.0, 20.0, 21.0), (1.1, 2.2, 5.0)) == (((1.0, 2.2, 5.0), False), 2)


def test_what_stays_disturbed_is_marked() -> None:
    """After the last try times are raised to the smaller program's, and said to be disturbed."""
    assert measured(*[(3.0, 2.0, 1.0)] * CALIBRATION_TRIES) == (((3.0, 3.0, 3.0), True), CALIBRATION_TRIES)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=4, max_size=4), st.integers(1, 4))
def test_more_work_never_takes_less_time(figures: list[tuple[float, float, float]], draws: int) -> None:
    """Whatever is measured, a step of more slices or draws is predicted to take as long or longer."""
    reports: Iterator[tuple[float, float, float]] = iter(figures)
    times, disturbed = settle(lambda: next(reports))
    manifest = make_manifest()
    names = [spec.name for spec in manifest.slices if spec.kind != "head"]
    planner = Planner(manifest, calibration=Calibration(1, 128, *times, disturbed))

    def seconds(slices: list[str], draws: int) -> float:
        step_s = planner.choose(Work(4, 32, draws, tuple(slices)), 1 << 40).step_s
        assert step_s is not None
        return step_s

    steps = [seconds(names[-count:] if count else [], draws) for count in range(len(names) + 1)]
    assert all(less <= more * (1 + 1e-9) for less, more in pairwise(steps))
    assert seconds(names, draws) <= seconds(names, draws + 1) * (1 + 1e-9)
