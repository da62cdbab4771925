"""The torch fleet of the slices bench: cut ranks, and calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.learning.slice_fleet import FleetRun, _mean, at_rank, calibration_error


def test_the_first_ranks_compute_at_alpha_over_their_number() -> None:
    """Values at rank b are those of a slice of b ranks, with B times r / b; other tensors stay."""
    a, b = torch.arange(12.0).reshape(1, 4, 3), torch.arange(20.0).reshape(1, 5, 4)
    cut = at_rank({"x.A": a, "x.B": b, "head.bias": a}, 2)
    assert torch.equal(cut["x.A"], a[:, :2])
    assert torch.equal(cut["x.B"], 2 * b[..., :2])
    assert cut["head.bias"] is a
    whole = {"x.A": a}
    assert at_rank(whole, 0) is whole


def test_each_rank_is_averaged_over_the_devices_that_held_it() -> None:
    """Of 30 rows, 10 of them of devices with two of four ranks, later ranks are averaged over 20."""
    held = {(2, 6): 10, (4, 6): 20}
    mean = _mean("encoder.encoder.layer.5.q.A", torch.full((1, 4, 3), 60.0), FleetRun(ranks=4), held)
    assert mean[0, :, 0].tolist() == [2.0, 2.0, 3.0, 3.0]
    assert float(_mean("head.bias", torch.tensor(60.0), FleetRun(ranks=4), held)) == 2.0


def test_each_block_is_averaged_over_the_devices_that_reach_it() -> None:
    """Of 30 rows, 10 of them of devices whose last exit is behind block 3, block 5 is averaged over 20."""
    held = {(0, 3): 10, (0, 6): 20}
    run = FleetRun(exits=(3, 6))
    for block, expected in ((2, 2.0), (4, 3.0)):
        mean = _mean(f"encoder.encoder.layer.{block}.q.core", torch.tensor(60.0), run, held)
        assert float(mean) == expected


def test_calibration_is_the_gap_between_confidence_and_accuracy() -> None:
    """Two rows at 0.8 of which one is right are off by 0.3, and so is a mean of such intervals."""
    shares = np.array([[0.8, 0.2], [0.8, 0.2]])
    assert calibration_error(shares, np.array([0, 1])) == pytest.approx(0.3)
    sure = np.array([[0.8, 0.2], [0.8, 0.2], [1.0, 0.0], [1.0, 0.0]])
    assert calibration_error(sure, np.array([0, 1, 0, 0])) == pytest.approx(0.15)
