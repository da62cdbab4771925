"""Sums to which the server adds noise: each contribution clipped, Gaussian noise on their sum, a fixed denominator.

The mean of a round is (Σ clip(Δ_i) + N(0, (z·C)²)) / n with n the places of a round, whoever answered (McMahan et al.
2018, "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, estimator f̃_f): a denominator that
counted the answers would itself tell who was there. All count alike, for a weight would be a part of the sensitivity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.mean import Contribution
from coordinator.config import PrivacyConfig
from edge_runtime.package.slices import Values
from edge_runtime.training.feature_sums import FeatureSums, SumsForm
from edge_runtime.training.gaussian import gaussian, on_grid
from edge_runtime.training.protected import clipped, flat_sums, unflat_sums

DoubleArray = NDArray[np.float64]
#: How many times all contributions of a run, all at their largest and alike, the noise may be: beyond it a step says
#: nothing of them.
DROWNED = 10.0


def noise_ratio(privacy: PrivacyConfig, numbers: int, places: int, rounds: int) -> tuple[float, float]:
    """Expected norm of the noise over that of contributions which all have ``clip_norm`` and point the same way.

    Args:
        privacy: the run's privacy, whose noise multiplier is known.
        numbers: how many numbers a contribution has.
        places: devices of a round.
        rounds: rounds that are added up.

    Returns:
        The ratio in one round, and over all rounds.
    """
    one = privacy.noise_std / privacy.clip_norm * math.sqrt(numbers)
    one /= math.sqrt(places) if privacy.where == "device" else places
    return one, one / math.sqrt(max(1, rounds))


def private_mean(
    contributions: Iterable[Contribution], privacy: PrivacyConfig, places: int, key: bytes, values: Values
) -> Contribution:
    """The noised mean of a round, as one contribution.

    Args:
        contributions: what devices contributed; consumed one at a time.
        privacy: the run's privacy.
        places: devices of a round, by which the sum is divided.
        key: secret key of the noise.
        values: current values, of whose shapes the deltas are; a round without contributions is noise alone.

    Raises:
        ValueError: contributions hold unlike tensors.
    """
    names: list[str] = []
    total = np.zeros(0)
    for contribution in contributions:
        if not names:
            names = sorted(contribution.delta)
            total = np.zeros(sum(contribution.delta[name].size for name in names))
        if sorted(contribution.delta) != names:
            raise ValueError("contributions of one round hold unlike tensors")
        parts = [contribution.delta[name].astype(np.float64).ravel() for name in names]
        total += clipped(np.concatenate(parts), privacy.clip_norm)
    return of_total(total, names, values, privacy, places, key)


def of_total(
    total: DoubleArray,
    names: list[str],
    values: Values,
    privacy: PrivacyConfig,
    places: int,
    key: bytes,
) -> Contribution:
    """The noised mean of a sum of clipped contributions.

    Args:
        total: their sum, tensor after tensor.
        names: flat names of the tensors, in that order.
        values: current values.
        privacy: the run's privacy.
        places: devices of a round.
        key: secret key of the noise.
    """
    std = privacy.noise_std
    noised = on_grid(total + gaussian(key, "server", len(total), std), std) / places
    delta, start = {}, 0
    for name in names:
        shape = values[name].shape
        size = math.prod(shape)
        delta[name] = noised[start : start + size].reshape(shape)
        start += size
    return Contribution(examples=1, delta=delta)


def private_sums(
    each: Iterable[FeatureSums], form: SumsForm, privacy: PrivacyConfig, key: bytes
) -> FeatureSums:
    """The noised sums of a round of a visit.

    Args:
        each: the sums of each device; consumed one at a time.
        form: what they are of.
        privacy: the run's privacy: with ``unit = "row"`` nothing is clipped, for a row adds at most 1 to the norm.
        key: secret key of the noise.
    """
    width = form.width
    total = np.zeros(width * (width + 1) // 2 + width * (1 + form.labels) + form.labels)
    limit = None if privacy.unit == "row" else privacy.clip_norm
    for sums in each:
        total += clipped(flat_sums(form, sums), limit)
    std = privacy.noise_std
    return unflat_sums(form, on_grid(total + gaussian(key, "server", len(total), std), std))


def made_possible(sums: FeatureSums) -> FeatureSums:
    """The nearest sums that some rows could have: noise makes products of features that no rows have.

    The Gram matrix with the sums and the number of rows beside it is positive semidefinite: eigenvalues below zero are
    set to it. Nothing but the noised sums is looked at, so this costs no privacy.
    """
    counts = np.maximum(sums.counts, 0.0)
    rows = max(1.0, float(counts.sum()))
    beside = sums.linear[:, :1]
    whole = np.block([[sums.gram, beside], [beside.T, np.array([[rows]])]])
    eigenvalues, vectors = np.linalg.eigh(whole)
    whole = (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T
    linear = sums.linear.copy()
    linear[:, 0] = whole[:-1, -1]
    return replace(
        sums, rows=max(1, round(float(whole[-1, -1]))), gram=whole[:-1, :-1], linear=linear, counts=counts
    )
