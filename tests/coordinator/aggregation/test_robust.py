"""Sizes of deltas, what they are compared with, and robust means: golden values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coordinator.aggregation.mean import Contribution, mean_delta
from coordinator.aggregation.robust import (
    LENIENCE,
    Yardsticks,
    bounded,
    lower_median,
    score,
    sizes,
    yardsticks,
)
from coordinator.config import RunConfig, run_config
from edge_runtime.errors import ConfigError
from tests.coordinator.conftest import RUN


def config(**changed: object) -> RunConfig:
    """A run's configuration."""
    return run_config({**RUN, "package": "p", "publisher_key": "A" * 43 + "=", **changed})


def contribution(*slices: float, head: float = 0.0, examples: int = 1, slot: int = 0) -> Contribution:
    """A delta with these entries of one slice, and one of the head."""
    return Contribution(
        examples,
        {"s/core": np.array(slices, np.float32), "head/core": np.array([head], np.float32)},
        slot=slot,
    )


def combined(contributions: list[Contribution], **changed: object) -> dict[str, list[float]]:
    """The mean delta of a round, through what a configuration makes of its contributions."""
    found = [sizes(each, 1) for each in contributions]
    pairs = zip(contributions, found, strict=True)
    means = mean_delta(bounded(pairs, yardsticks(found, {}).medians, config(**changed)))
    return {name: array.tolist() for name, array in means.items()}


def test_sizes_are_of_an_entry_and_a_step() -> None:
    """3 and 4 have the root mean square 5/√2, a fifth of it in five steps; each slice is measured apart."""
    found = sizes(contribution(3, 4, head=-2), 5)
    assert found == {"s": pytest.approx(5 / math.sqrt(2) / 5), "head": 0.4}
    assert sizes(contribution(math.inf, 1), 1)["s"] == math.inf
    assert sizes(contribution(3e38, 3e38), 1)["s"] == pytest.approx(3e38)


def test_the_lower_median() -> None:
    """Of an even number the lower of the middle two; zeros and infinities say nothing of size."""
    assert lower_median([5.0, 1.0, 3.0, 1e30]) == 3.0
    assert lower_median([2.0, 1.0]) == 1.0
    assert lower_median([0.0, math.inf, 4.0]) == 4.0
    assert lower_median([0.0]) is None


def test_what_sizes_are_compared_with() -> None:
    """Three devices that trained a slice are its measure; else what it was before is a hint, or other slices."""
    three = [{"s": size} for size in (5.0, 1.0, 3.0, 1e30)]
    assert yardsticks(three, {"s": 9.0}) == Yardsticks({"s": 3.0}, {})
    assert yardsticks(three[:2], {"s": 9.0}) == Yardsticks({}, {"s": 9.0})
    assert yardsticks(three[:2], {}) == Yardsticks({}, {"s": 1.0})
    assert yardsticks(three[:1], {}) == Yardsticks({}, {})
    dealt = [{"s": 2.0}, {"t": 50.0}, {"u": 1e9}]
    assert yardsticks(dealt, {}) == Yardsticks({}, {"s": 50.0, "t": 2.0, "u": 2.0})


def test_a_score_is_the_worst_slice() -> None:
    """How many times a delta exceeds a slice's median, or a hundred times a hint, where there is either."""
    assert score({"s": 6.0, "head": 10.0}, Yardsticks({"s": 2.0, "head": 2.0}, {})) == 5.0
    assert score({"s": 600.0}, Yardsticks({}, {"s": 2.0})) == 600.0 / (2.0 * LENIENCE)
    assert score({"s": 6.0}, Yardsticks({"head": 2.0}, {})) == 0.0
    assert score({"s": 1e13}, Yardsticks({}, {})) == math.inf


def test_a_plain_mean_is_what_it_was() -> None:
    """Without a robust mean contributions pass as they are: the very same objects, so the very same bits."""
    all_of_them = [contribution(1, 2, slot=0), contribution(3, 5, examples=3, slot=1)]
    pairs = [(each, sizes(each, 1)) for each in all_of_them]
    passed = list(bounded(pairs, {}, config()))
    assert all(one is other for one, other in zip(passed, all_of_them, strict=True))


def test_clipped() -> None:
    """Deltas above the median are scaled down to it, slices and head apart, and then weighed by examples."""
    all_of_them = [contribution(1, head=1), contribution(2, head=1, examples=2), contribution(40, head=-1)]
    assert combined(all_of_them, robust_mean="clipped") == {
        "s/core": [(1 + 2 * 2 + 2) / 4],
        "head/core": [0.5],
    }


def test_median() -> None:
    """Each entry's median over the devices, whatever their examples; of an even number the mean of the middle two."""
    odd = [contribution(1, 9), contribution(2, -1e30, examples=50), contribution(1e30, 5)]
    assert combined(odd, robust_mean="median")["s/core"] == [2.0, 5.0]
    even = [*odd, contribution(4, 7)]
    assert combined(even, robust_mean="median")["s/core"] == [3.0, 6.0]
    assert combined(even[:2], robust_mean="median")["s/core"][0] == 1.5


def test_trimmed() -> None:
    """The largest and smallest share of each entry is left out, at least one of three; then all count the same."""
    five = [contribution(value) for value in (1, 2, 3, 6, 1e30)]
    assert combined(five, robust_mean="trimmed")["s/core"] == [pytest.approx(11 / 3)]
    assert combined(five, robust_mean="trimmed", trim_share=0.4)["s/core"] == [3.0]
    assert combined(five[:2], robust_mean="trimmed")["s/core"] == [1.5]


def test_a_tensor_is_averaged_over_those_who_trained_it() -> None:
    """A centre is taken over the devices that sent a tensor; one without examples weighs nothing."""
    other = Contribution(1, {"t/core": np.array([7.0], np.float32)})
    nothing = contribution(1e9, examples=0)
    found = combined([contribution(1), contribution(3), other, nothing], robust_mean="median")
    assert (found["s/core"], found["t/core"]) == ([2.0], [7.0])


@pytest.mark.parametrize(
    "changed",
    [
        {"gate_variance": 1.0, "min_results": 2},
        {"normalise_steps": True},
        {"lora_aggregation": "product_svd"},
    ],
)
def test_a_centre_knows_no_weights(changed: dict[str, object]) -> None:
    """What weighs or halves a round's changes is refused beside an entry's centre, with the way out, which works."""
    for robust_mean in ("trimmed", "median"):
        with pytest.raises(ConfigError, match="clipped"):
            config(robust_mean=robust_mean, **changed)
    config(robust_mean="clipped", **changed)
