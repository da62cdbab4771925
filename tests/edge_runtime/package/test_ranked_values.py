from __future__ import annotations

import numpy as np

from edge_runtime.package.ranked_values import cut, widened
from edge_runtime.package.ranks import with_rank
from tests.edge_runtime.package.test_ranks import manifest


def test_values_are_cut_to_their_first_ranks() -> None:
    """Cutting keeps the first rows of A and columns of B bit for bit, and leaves all else as it is."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((1, 4, 6)), generator.standard_normal((1, 8, 4))
    values = {"block0.query/A": a, "block0.query/B": b, "head/weight": np.ones((2, 4))}
    few = cut(values, with_rank(manifest(), 2).slices)
    assert few["block0.query/A"].tobytes() == np.ascontiguousarray(a[:, :2]).tobytes()
    assert few["block0.query/B"].tobytes() == np.ascontiguousarray(b[:, :, :2]).tobytes()
    assert few["head/weight"] is values["head/weight"]
    assert cut(few, with_rank(manifest(), 2).slices).keys() == values.keys()


def test_an_array_is_widened_with_zeros_around_it() -> None:
    """Entries keep their values at the place that is asked for, and all others are zero."""
    array = np.ones((2, 1, 3), np.float32)
    wide = widened(array, 1, 4, 2)
    assert wide.shape == (2, 4, 3)
    assert wide[:, 2].all()
    assert not np.delete(wide, 2, axis=1).any()
    assert widened(array, 1, 1) is array
