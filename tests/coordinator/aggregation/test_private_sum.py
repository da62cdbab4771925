"""Noised sums: each part is bounded, the denominator is fixed, and noised sums become such as rows could have."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.private_sum import made_possible, noise_ratio, private_mean, private_sums
from coordinator.config import PrivacyConfig
from edge_runtime.training.feature_sums import FeatureSums, SumsForm
from edge_runtime.training.protected import flat_sums, unflat_sums

KEY = bytes(32)
FAINT = PrivacyConfig(noise_multiplier=1e-6, clip_norm=1.0)
FORM = SumsForm(width=4, size=4, square=4, labels=2, dtype="float32")
VALUES = {"a/x": np.zeros((2, 2), np.float32), "b/y": np.zeros(3, np.float32)}


def contribution(scale: float, examples: int = 1) -> Contribution:
    delta = {"a/x": np.full((2, 2), scale, np.float32), "b/y": np.full(3, -scale, np.float32)}
    return Contribution(examples, delta)


def sums_of(seed: int, rows: int) -> FeatureSums:
    """Sums of rows of squared length 4, of two classes."""
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((rows, 4))
    features *= 2 / np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.eye(2)[generator.integers(0, 2, rows)]
    beside = np.concatenate([np.ones((rows, 1)), labels], axis=1)
    return FeatureSums(rows, features.T @ features, features.T @ beside, labels.sum(axis=0))


def test_one_device_changes_the_mean_by_its_share_of_the_norm_at_most() -> None:
    """However large a change or its weight, it moves the mean by clip_norm over the places, beside the noise."""
    few = private_mean([contribution(0.1)], FAINT, 4, KEY, VALUES)
    more = private_mean([contribution(0.1), contribution(1e6, 1000)], FAINT, 4, KEY, VALUES)
    moved = np.concatenate([(more.delta[name] - few.delta[name]).ravel() for name in sorted(VALUES)])
    assert np.linalg.norm(moved) == pytest.approx(1 / 4, rel=1e-4)
    assert np.linalg.norm(few.delta["a/x"]) == pytest.approx(0.2 / 4, rel=1e-4)


def test_what_is_not_finite_counts_as_nothing() -> None:
    """An infinite change neither spoils the sum nor ends the round."""
    mean = private_mean([contribution(np.inf), contribution(0.1)], FAINT, 2, KEY, VALUES)
    assert mean.delta["b/y"] == pytest.approx(np.full(3, -0.05), rel=1e-3)


def test_a_row_adds_at_most_one_to_the_norm() -> None:
    """The vector of one row's sums has a norm of at most 1, whatever row it is; of n rows at most n."""
    for seed in range(20):
        assert np.linalg.norm(flat_sums(FORM, sums_of(seed, 1))) <= 1 + 1e-9
    assert np.linalg.norm(flat_sums(FORM, sums_of(3, 50))) <= 50


def test_sums_come_back_from_their_vector() -> None:
    """A vector holds all of the sums."""
    sums = sums_of(1, 9)
    back = unflat_sums(FORM, flat_sums(FORM, sums))
    assert back.rows == 9
    for name in ("gram", "linear", "counts"):
        assert getattr(back, name) == pytest.approx(getattr(sums, name))


def test_sums_of_a_device_are_clipped_and_of_rows_are_not() -> None:
    """By device a large device counts clip_norm; by row all of its rows count."""
    by_row = PrivacyConfig(noise_multiplier=1e-6, unit="row")
    large = sums_of(2, 40)
    assert private_sums([large], FORM, by_row, KEY).rows == 40
    clipped = private_sums([large], FORM, FAINT, KEY)
    assert np.linalg.norm(flat_sums(FORM, clipped)) == pytest.approx(1.0, rel=1e-3)


def test_noised_sums_are_made_such_as_some_rows_could_have() -> None:
    """With the sums and the number of rows beside it the Gram matrix has no negative eigenvalue; counts are none."""
    strong = PrivacyConfig(noise_multiplier=10.0, unit="row")
    noised = private_sums([sums_of(4, 30)], FORM, strong, KEY)
    assert np.linalg.eigvalsh(noised.gram).min() < 0
    possible = made_possible(noised)
    assert np.linalg.eigvalsh(possible.gram).min() > -1e-9
    assert (possible.counts >= 0).all()
    assert possible.rows >= 1
    exact = sums_of(5, 30)
    assert made_possible(exact).gram == pytest.approx(exact.gram)


def test_the_noise_is_told_beside_what_it_hides() -> None:
    """By the server it falls with the places, by devices with their root; over rounds with the root of those."""
    server = PrivacyConfig(noise_multiplier=2.0, clip_norm=3.0)
    assert noise_ratio(server, 400, 10, 16) == pytest.approx((4.0, 1.0))
    device = PrivacyConfig(where="device", noise_multiplier=2.0, clip_norm=3.0)
    assert noise_ratio(device, 400, 100, 1) == pytest.approx((4.0, 4.0))
