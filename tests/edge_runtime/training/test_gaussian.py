"""Noise from a secret key."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.training.gaussian import gaussian, on_grid

KEY = bytes(range(32))


def test_gaussian_noise_is_normal_and_each_label_has_its_own() -> None:
    """Mean, spread and tails are those of a normal distribution; labels and keys do not share numbers."""
    drawn = gaussian(KEY, "a", 200_001, 2.0)
    assert len(drawn) == 200_001
    assert abs(drawn.mean()) < 0.03
    assert drawn.std() == pytest.approx(2.0, rel=0.01)
    assert (np.abs(drawn) > 4.0).mean() == pytest.approx(0.0455, abs=0.003)
    assert not np.isin(drawn[:100], gaussian(KEY, "b", 100, 2.0)).any()
    step = 2.0 ** np.floor(np.log2(2.0 / 1024))
    assert (on_grid(drawn, 2.0) / step == np.rint(on_grid(drawn, 2.0) / step)).all()
