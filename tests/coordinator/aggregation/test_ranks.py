from __future__ import annotations

import numpy as np

from coordinator.aggregation.mean import Contribution, mean_delta
from coordinator.aggregation.ranks import by_rank, joined_ranks
from tests.edge_runtime.package.test_ranks import manifest

A, B = "block0.query/A", "block0.query/B"
SPECS = manifest().slices
VALUES = {A: np.zeros((1, 4, 6), np.float32), B: np.zeros((1, 8, 4), np.float32)}


def device(rank: int, size: float, examples: int = 1) -> Contribution:
    return Contribution(
        examples, {A: np.full((1, rank, 6), size), B: np.full((1, 8, rank), size), "head/w": np.ones(2)}
    )


def mean(*devices: Contribution) -> dict[str, np.ndarray]:
    return joined_ranks(mean_delta(by_rank(devices, SPECS)), VALUES, SPECS)


def test_each_rank_is_averaged_over_the_devices_that_held_it() -> None:
    """Devices of one, two and three ranks: the first is the mean of all, the third that of the one that had it."""
    found = mean(device(1, 1.0), device(2, 2.0), device(3, 6.0, examples=2))
    for entries in (found[A][0, :, 0], found[B][0, 0]):
        np.testing.assert_allclose(entries, [15 / 4, 14 / 3, 6.0, 0.0])
    np.testing.assert_array_equal(found["head/w"], np.ones(2))


def test_devices_of_equal_ranks_have_the_plain_mean() -> None:
    """Where all hold all ranks, the mean is that of whole tensors."""
    plain = mean_delta([device(4, 1.0), device(4, 4.0, examples=3)])
    found = mean(device(4, 1.0), device(4, 4.0, examples=3))
    for name, array in plain.items():
        np.testing.assert_allclose(found[name], array)


def test_tensors_that_nobody_trained_are_missing() -> None:
    """A tensor without a contribution has no delta, so that its optimiser state stays."""
    assert set(mean(Contribution(1, {"head/w": np.ones(2)}))) == {"head/w"}
