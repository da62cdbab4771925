"""Means over devices whose gradients were found in unlike ways."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.aggregation.mean import Contribution, mean_delta
from coordinator.rounds.stated_variance import variance_factors
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.protocol.messages import Directions
from edge_runtime.training.gradient import estimate
from edge_runtime.training.tangents import draw_tangents
from tests.edge_runtime.golden.tangents import TASK

SPECS = tuple(
    SliceSpec(f"s{i}", "lora_xs", (0,), "t", (TensorSpec("core", (1, size), "core"),))
    for i, size in enumerate((6, 8))
)
HEAD = SliceSpec("head", "head", (1,), "head", (TensorSpec("weight", (2, 3), "head"),))
BATCH, DRAWS = 6, 4
TASK_OF = replace(
    TASK, update="best", slices=("s0", "s1"), train_head=True, batch_size=BATCH, draws=DRAWS, steps=1
)


def gradients_of(device: int) -> np.ndarray:
    """Gradients (B, d) of a device's examples: what all agree on, and an own part."""
    common = np.random.default_rng(0).normal(size=14)
    return (common + 2 * np.random.default_rng(device + 1).normal(size=(BATCH, 14))).astype(np.float32)


def contribution(device: int, directions: Directions, seed: int | None) -> Contribution:
    """A device's change of the slices; exact without a seed."""
    task = replace(TASK_OF, directions=directions, slot=device, seed=seed or 0)
    gradients, factors = gradients_of(device), {}
    if seed is None:
        mean = gradients.mean(axis=0, dtype=np.float64)
        delta = {"s0/core": mean[None, :6], "s1/core": mean[None, 6:]}
    else:
        tangents = draw_tangents(task, SPECS, 0, range(BATCH))
        flat = np.concatenate(list(tangents.values()), axis=2)
        delta = dict(estimate((flat * gradients).sum(-1), tangents))
        factors = variance_factors(task, [*SPECS, HEAD], "forward", DRAWS)
    delta["head/weight"] = np.full((2, 3), float(device))
    return Contribution(BATCH, delta, slot=device, variance=factors)


@pytest.mark.parametrize("directions", ["one_slice", "dealt", "per_example"])
def test_a_mixed_fleets_mean_is_the_exact_one_in_expectation(directions: Directions) -> None:
    """Over many seeds the mean of two exact and three estimated contributions is that of exact ones, weighed alike.

    The mean of N rounds misses by a round's own spread over √N; three times that bounds the miss. The head, exact on
    every device, is averaged by examples alone.
    """
    exact = [contribution(device, directions, None) for device in range(5)]
    stated = [each if each.slot < 2 else contribution(each.slot, directions, 1) for each in exact]
    weighed = [replace_variance(each, like.variance) for each, like in zip(exact, stated, strict=True)]
    wanted = mean_delta(weighed)
    rounds = [
        mean_delta([*exact[:2], *(contribution(device, directions, seed) for device in range(2, 5))])
        for seed in range(1, 800)
    ]
    for name in ("s0/core", "s1/core"):
        made = np.stack([each[name] for each in rounds])
        spread = made.var(axis=0).sum() / len(made)
        assert ((made.mean(axis=0) - wanted[name]) ** 2).sum() < 9 * spread
    assert np.allclose(rounds[0]["head/weight"], 2.0)


def replace_variance(of: Contribution, variance: dict[str, float]) -> Contribution:
    return Contribution(of.examples, of.delta, slot=of.slot, variance=variance)


def test_stated_variance_weighs_better_than_examples() -> None:
    """A mixed round's slices vary less, from round to round, than with weights by examples alone."""

    def spread(stated: bool) -> float:
        rounds = []
        for seed in range(1, 200):
            given = [contribution(device, "one_slice", None if device < 2 else seed) for device in range(5)]
            made = mean_delta(given if stated else [replace_variance(each, {}) for each in given])
            rounds.append(np.concatenate([made["s0/core"].ravel(), made["s1/core"].ravel()]))
        return float(np.stack(rounds).var(axis=0).sum())

    assert spread(stated=True) < 0.6 * spread(stated=False)


@pytest.mark.parametrize(
    ("directions", "factors"),
    [
        ("one_slice", (1 + 11 / 12, 1 + 15 / 12)),
        ("dealt", (1 + 11 / 12, 1 + 15 / 12)),
        ("per_example", (1 + 13 / 12, 1 + 13 / 12)),
        ("shared", (1 + 6 * 13 / 12, 1 + 6 * 13 / 12)),
        ("gaussian", (1 + 6 * 15 / 12, 1 + 6 * 15 / 12)),
    ],
)
def test_factors_are_those_of_the_formulas(directions: Directions, factors: tuple[float, float]) -> None:
    """2 slices of 6 and 8 entries, 4 draws, 6 examples, c = 2: S·d_s or all d entries; the batch shares or does not."""
    task = replace(TASK_OF, directions=directions)
    found = variance_factors(task, [*SPECS, HEAD], "forward", 4)
    assert found == pytest.approx(dict(zip(("s0/core", "s1/core"), factors, strict=True)))
    assert variance_factors(task, [*SPECS, HEAD], "backprop", 0) == {}
    assert variance_factors(task, [*SPECS, HEAD], None, 0) == {}
