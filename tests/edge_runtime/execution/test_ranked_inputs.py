from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.execution.ranked_inputs import ranked_inputs
from edge_runtime.package.ranks import with_rank
from tests.edge_runtime.package.test_ranks import manifest


def test_few_ranks_compute_what_a_smaller_slice_does() -> None:
    """What a program is given makes its product alpha / r of four ranks that of alpha / b of the first b."""
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((1, 2, 6), (1, 8, 2)))
    inputs = ranked_inputs(with_rank(manifest(), 2))
    wide_a, wide_b = inputs["block0.query/A"].fed(a), inputs["block0.query/B"].fed(b)
    assert (wide_a.shape, wide_b.shape) == ((1, 4, 6), (1, 8, 4))
    np.testing.assert_allclose((1 / 4) * wide_b @ wide_a, (1 / 2) * b @ a, rtol=1e-6)


def test_tangents_and_gradients_are_scaled_alike() -> None:
    """A tangent is widened as its value is, and a gradient of the fed tensor comes back as that of the held one."""
    held = ranked_inputs(manifest())["block0.query/B"]
    tangent = np.ones((3, 2, 8, 1), np.float32)
    assert held.fed(tangent).shape == (3, 2, 8, 4)
    bar = np.random.default_rng(2).standard_normal((1, 8, 4)).astype(np.float32)
    slope = held.taken(bar, 1)
    assert slope.shape == (1, 8, 1)
    # <bar, fed(tangent)> = <slope, tangent>
    assert float((bar * held.fed(tangent[:1, 0])).sum()) == pytest.approx(
        float((slope * tangent[:1, 0]).sum()), rel=1e-5
    )
    assert held.taken(bar, 4) is bar
