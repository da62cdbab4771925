"""Random projections: replayable by the seed, orthogonal, and as good for a head as they are said to be."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.training.projection import Projection
from edge_runtime.training.tangents import philox_key

WIDTH, KEPT = 300, 128


def features_of(rows: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((rows, WIDTH)).astype(np.float32)


def matrix_of(projection: Projection) -> np.ndarray:
    """The projection as a matrix (D, k)."""
    return projection.of(np.eye(WIDTH, dtype=np.float32))


def test_a_projection_is_that_of_the_formula() -> None:
    """Entry (f, p) is the sign of feature f, times -1 for each bit that f and place p share, over √n.

    Signs and places are those that numpy's own generator draws at the stated addresses: one seed gives the same ones on
    every machine, or the sums of a fleet's devices would not add up.
    """
    key, size = philox_key(3, 0, 0, "sums/"), 512
    words = np.random.Philox(key=key, counter=[0, 0, 0, 0]).random_raw(-(-WIDTH // 64))
    signs = [1 if int(words[f // 64]) >> (f % 64) & 1 else -1 for f in range(WIDTH)]
    places = np.argsort(np.random.Philox(key=key, counter=[0, 1, 0, 0]).random_raw(size), kind="stable")
    wanted = [
        [sign * (-1) ** (f & int(p)).bit_count() for p in places[:KEPT]] for f, sign in enumerate(signs)
    ]
    np.testing.assert_allclose(
        matrix_of(Projection(WIDTH, KEPT, seed=3)), np.array(wanted) / np.sqrt(size), atol=1e-6
    )


def test_another_seed_gives_another_projection() -> None:
    """Two seeds agree in no more signs than chance has it."""
    one, other = (np.sign(matrix_of(Projection(WIDTH, KEPT, seed=seed))) for seed in (3, 4))
    assert 0.4 < (one != other).mean() < 0.6


def test_no_row_grows() -> None:
    """A projection's squared length is at most the row's, so the bound on sums holds; on average it is its share."""
    rows = features_of(400)
    projected = Projection(WIDTH, KEPT, seed=1).of(rows)
    before, after = (rows**2).sum(1), (projected**2).sum(1)
    assert (after <= before * (1 + 1e-5)).all()
    assert (after / before).mean() == pytest.approx(KEPT / 512, rel=0.05)


def test_a_weight_on_projections_is_one_on_features() -> None:
    """What a weight gives on the projections, the weight that is turned back gives on the features themselves."""
    projection = Projection(WIDTH, KEPT, seed=2)
    rows, weight = features_of(7), np.random.default_rng(1).standard_normal((4, KEPT)).astype(np.float32)
    np.testing.assert_allclose(
        rows @ projection.back(weight).T, projection.of(rows) @ weight.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("width", "kept"), [(129, 128), (2688, 1024)])
def test_any_width_is_turned(width: int, kept: int) -> None:
    """Widths that are no power of two are filled up with zeros: columns stay of length at most one."""
    rows = np.eye(width, dtype=np.float32)[:10]
    projected = Projection(width, kept, seed=0).of(rows)
    assert projected.shape == (10, kept)
    size = 1 << (width - 1).bit_length()
    np.testing.assert_allclose(np.abs(projected), 1 / np.sqrt(size), rtol=1e-5)
