"""What a change weighs by its age, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.mean import Contribution, mean_delta
from coordinator.aggregation.staleness import discounted

DELTA = {"s/core": np.array([1.0, -3.0], np.float32)}


@pytest.mark.parametrize(("staleness", "weight"), [(0, 1.0), (3, 0.5), (8, 1 / 3)])
def test_a_change_is_scaled_by_its_age(staleness: int, weight: float) -> None:
    """1/sqrt(1 + age), by the paper's formula with its usual exponent; the example weights stay."""
    found = discounted(Contribution(4, DELTA), staleness)
    assert found.examples == 4
    np.testing.assert_allclose(found.delta["s/core"], [weight, -3 * weight], rtol=1e-15)


def test_what_is_fresh_keeps_every_bit() -> None:
    """A contribution of age 0 is the very same object, so a run whose rounds wait is as it was."""
    contribution = Contribution(4, DELTA)
    assert discounted(contribution, 0) is contribution


def test_a_stale_buffer_makes_a_shorter_step() -> None:
    """The mean of two changes of age 3 is half of the mean of fresh ones: weights are not divided out again."""
    fresh = mean_delta([Contribution(4, DELTA), Contribution(2, DELTA)])
    stale = mean_delta([discounted(Contribution(count, DELTA), 3) for count in (4, 2)])
    np.testing.assert_allclose(stale["s/core"], 0.5 * fresh["s/core"], rtol=1e-15)
