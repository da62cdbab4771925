"""ε of Gaussian noise that a device's data met several times, by privacy loss distributions (``dp-accounting``).

A device that took part m times met m Gaussian mechanisms of noise multiplier z, which together are one of z/√m. No
amplification by sampling is counted: whom a round asks follows from the run's seed, which is no secret
(:mod:`coordinator.rounds.selection`), and rounds are of fixed size, not of independent coins.

Neighbouring fleets differ in one device's contribution, there or not, where the server adds the noise: the sum changes
by ``clip_norm`` at most. Where each device adds its own, they differ in what that device has: by twice that.

The library is imported when it is used: it brings scipy.
"""

from __future__ import annotations

import math
from functools import lru_cache

from coordinator.config import PrivacyConfig
from edge_runtime.errors import ConfigError

#: Noise multipliers among which one is looked for.
LEAST_MULTIPLIER, MOST_MULTIPLIER = 0.01, 100_000.0
#: How far above the least the multiplier that is found may be, relative to it.
PRECISION = 1e-3
#: Noise multiplier below which a bound stands for the distribution, whose table would grow by its square: r + 2√(r ln
#: 1/δ) with r = 1/2z² (Bun & Steinke 2016, "Concentrated Differential Privacy", proposition 1.3). ε is above 70 there.
WEAK = 0.1


def epsilon_of(privacy: PrivacyConfig, times: int) -> float:
    """ε of a run with so many participations of its busiest device; 0 before the first.

    Args:
        privacy: the run's privacy, whose noise multiplier is known.
        times: number of rounds and visits in which the busiest device took part.

    Raises:
        ConfigError: the library is not installed.
    """
    return _epsilon(_effective(privacy, privacy.noise_multiplier or 0.0), times, privacy.delta)


def multiplier_for(privacy: PrivacyConfig, times: int) -> float:
    """The least noise multiplier at which so many participations stay within ``privacy.epsilon``.

    Raises:
        ConfigError: the library is not installed, or no multiplier is large enough.
    """
    wanted = privacy.epsilon
    if wanted is None:
        raise ConfigError("privacy.epsilon is missing")
    low, high = LEAST_MULTIPLIER, LEAST_MULTIPLIER
    while _epsilon(_effective(privacy, high), times, privacy.delta) > wanted:
        low, high = high, 2 * high
        if high > MOST_MULTIPLIER:
            raise ConfigError(
                f"no noise gives privacy.epsilon = {wanted:g} at delta = {privacy.delta:g} over {times} rounds; "
                "raise epsilon, or lower rounds or most_rounds"
            )
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        if _epsilon(_effective(privacy, middle), times, privacy.delta) > wanted:
            low = middle
        else:
            high = middle
    return high


def _effective(privacy: PrivacyConfig, multiplier: float) -> float:
    """The multiplier over what neighbouring fleets differ by."""
    return multiplier / 2 if privacy.where == "device" else multiplier


@lru_cache(maxsize=4096)
def _epsilon(multiplier: float, times: int, delta: float) -> float:
    if times == 0:
        return 0.0
    try:
        from dp_accounting.pld import privacy_loss_distribution  # noqa: PLC0415 - a large library, for this alone
    except ImportError as error:
        raise ConfigError(
            "privacy needs the package dp-accounting to count ε; install the extra: pip install "
            "'edge-runtime[coordinator,privacy]'"
        ) from error
    together = multiplier / math.sqrt(times)
    if together < WEAK:
        loss_mean = 1 / (2 * together * together)
        return loss_mean + 2 * math.sqrt(loss_mean * math.log(1 / delta))
    loss = privacy_loss_distribution.from_gaussian_mechanism(together, value_discretization_interval=1e-3)
    return float(loss.get_epsilon_for_delta(delta))
