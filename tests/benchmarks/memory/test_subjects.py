import pytest

from benchmarks.memory.subjects import step_seconds
from edge_runtime.worker.jobs import StepMeasure


@pytest.mark.parametrize(("warm_up", "seconds"), [(1, 2.5), (2, 2.0), (4, 1.0)])
def test_a_step_lasts_from_the_end_of_the_one_before(warm_up: int, seconds: float) -> None:
    """The median is over the steps after the warm-up; the first never counts, since nothing tells when it began."""
    steps = tuple(StepMeasure(end_s, 0) for end_s in (10.0, 15.0, 18.0, 20.0, 21.0))
    assert step_seconds(steps, warm_up) == seconds
