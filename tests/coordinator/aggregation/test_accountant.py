"""ε of several Gaussian mechanisms, against the closed formula; multipliers that are found; what is missing is told."""

from __future__ import annotations

import math
import sys

import pytest

from coordinator.aggregation import accountant
from coordinator.aggregation.accountant import epsilon_of, multiplier_for
from coordinator.config import PrivacyConfig
from edge_runtime.errors import ConfigError


def delta_of(multiplier: float, epsilon: float) -> float:
    """δ of one Gaussian mechanism (Balle & Wang 2018, "Improving the Gaussian Mechanism", theorem 8)."""

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    mu = 1 / multiplier
    return normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("multiplier", "times"), [(1.0, 1), (2.0, 4), (0.5, 1), (5.0, 100)])
def test_epsilon_is_that_of_the_closed_formula(multiplier: float, times: int) -> None:
    """m mechanisms of multiplier z are one of z/√m; ε of it gives back δ, from above."""
    epsilon = epsilon_of(PrivacyConfig(noise_multiplier=multiplier), times)
    together = multiplier / math.sqrt(times)
    assert delta_of(together, epsilon) <= 1e-5 * 1.001
    assert delta_of(together, epsilon * 0.995) > 1e-5


def test_devices_that_add_noise_differ_by_twice_the_norm() -> None:
    """What a device has may be anything else of the norm, so its noise counts half."""
    own = PrivacyConfig(where="device", noise_multiplier=4.0)
    assert epsilon_of(own, 3) == epsilon_of(PrivacyConfig(noise_multiplier=2.0), 3)


def test_the_least_noise_for_an_epsilon_is_found() -> None:
    """The multiplier keeps ε, and a hundredth less would not."""
    privacy = PrivacyConfig(epsilon=2.0)
    found = multiplier_for(privacy, 10)
    assert epsilon_of(PrivacyConfig(noise_multiplier=found), 10) <= 2.0
    assert epsilon_of(PrivacyConfig(noise_multiplier=found * 0.99), 10) > 2.0


def test_weak_noise_has_a_bound_and_none_has_no_rounds() -> None:
    """Below a tenth ε follows from a bound that is above the formula's; before the first round it is 0."""
    weak = epsilon_of(PrivacyConfig(noise_multiplier=0.09), 1)
    assert weak > epsilon_of(PrivacyConfig(noise_multiplier=0.11), 1) > 50
    assert epsilon_of(PrivacyConfig(noise_multiplier=1.0), 0) == 0.0


def test_without_the_library_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dp-accounting is not installed, the message names the extra."""
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    accountant._epsilon.cache_clear()
    with pytest.raises(ConfigError, match=r"edge-runtime\[coordinator,privacy\]"):
        epsilon_of(PrivacyConfig(noise_multiplier=1.0), 7)
