"""A rate that sets itself: by hand, on parabolas, and under measurements that say nothing or too much."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.own_rate import LEAST_RATE, MOST, MOST_RATE, START, OwnRate, measured


def test_two_rounds_by_hand() -> None:
    """The rate is the ratio of averages that keep four fifths, within a factor of 1.5 of the last."""
    # A step of length 0.1 has the slope -0.01 and the curvature 0.05 over its length: s = -0.1, c = 5.
    first = OwnRate(rate=0.1).stepped(1.0).measured(-0.01, 0.05)
    assert (first.pull, first.bend) == (pytest.approx(0.2 * (5 * 0.1 + 0.1)), pytest.approx(0.2 * 5))
    assert first.rate == pytest.approx(0.12)  # 0.1 - s/c
    # The next, of length 0.06, has s = 1 and c = 5: it was 0.2 too long.
    second = first.stepped(0.5).measured(0.06, 5 * 0.06**2)
    assert second.pull == pytest.approx(0.8 * 0.12 + 0.2 * (5 * 0.06 - 1))
    assert second.bend == pytest.approx(0.8 * 1 + 0.2 * 5)
    assert second.rate == pytest.approx(0.12 / MOST)  # wanted is below


@pytest.mark.parametrize("start", [0.001, 0.05, 10.0])
def test_the_best_length_is_found_from_far_away(start: float) -> None:
    """On a parabola whose best step is 0.3, noise half as large as the slope at 0, the rate comes near and stays."""
    random, own = np.random.default_rng(5), OwnRate(rate=start)
    rates = []
    for _ in range(80):
        own = own.stepped(1.0)
        slope = 7.0 * (own.moved - 0.3) + 2 * 7.0 * 0.3 * random.standard_normal() / 4
        own = own.measured(slope * own.moved, 7.0 * own.moved**2)
        rates.append(own.rate)
    assert np.median(rates[40:]) == pytest.approx(0.3, rel=0.15)
    assert max(abs(np.diff(np.log(rates)))) <= np.log(MOST) + 1e-12


def test_what_says_nothing_changes_nothing() -> None:
    """Before the first step, on a flat loss, and where no device measured, the rate stays."""
    assert OwnRate().measured(-1.0, 4.0) == OwnRate()
    own = OwnRate().stepped(1.0)
    assert own.rate == START
    assert own.measured(0.0, 0.0) == own
    assert measured(own, []) == (own, False)
    assert measured(own, [(0, (-1.0, 4.0))]) == (own, False)
    assert measured(own, [(8, (0.0, 0.0))]) == (own, True)


def test_devices_weigh_by_their_examples() -> None:
    """Slope and curvature are means over examples."""
    own = OwnRate().stepped(1.0)
    assert measured(own, [(1, (3.0, 1.0)), (3, (-1.0, 5.0))])[0] == own.measured(0.0, 4.0)


def test_the_rate_stays_within_bounds() -> None:
    """However long one side pulls, the rate is a finite number that training could want."""
    for slope, bound in ((-1e30, MOST_RATE), (1e30, LEAST_RATE)):
        own = OwnRate()
        for _ in range(100):
            own = own.stepped(1.0).measured(slope, 1e-20)
        assert own.rate == bound
