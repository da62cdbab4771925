from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_runtime.errors import ConfigError
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.optimizers import make_optimizer
from edge_runtime.training.sketch import Sketch

START = {
    "a/core": np.array([[[1.0, -2.0]]], dtype=np.float32),
    "b/core": np.array([[[0.1]]], dtype=np.float32),
    "head/bias": np.array([0.5, 0.0], dtype=np.float32),
}
SLOPES = {
    "a/core": np.array([[[0.5, -1.0]]], dtype=np.float32),
    "head/bias": np.array([1.0, 2.0], dtype=np.float32),
}
KINDS = ("accumulate", "sgd", "adamw")


def optimizer(
    name: str, slice_rate: float = 0.1, head_rate: float = 0.01, trained: tuple[str, ...] = tuple(SLOPES)
):
    return make_optimizer(LocalOptimizer(name, slice_rate, head_rate), START, list(trained))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        arrays(np.float32, (1, 1, 2), elements=st.integers(-512, 512).map(lambda n: n / 64)), max_size=8
    )
)
def test_accumulate_is_minus_the_rate_times_the_sum(steps: list[np.ndarray]) -> None:
    """The change is the sum of all gradients, and values stay where the task began."""
    chosen = optimizer("accumulate", slice_rate=0.5)
    for slope in steps:
        chosen.step({"a/core": slope})
        assert np.array_equal(chosen.values()["a/core"], START["a/core"])
    # Sums of a few multiples of 1/64, times one half, are exact in float32.
    expected = -0.5 * np.sum([np.zeros((1, 1, 2)), *steps], axis=0)
    assert np.array_equal(chosen.delta()["a/core"], expected.astype(np.float32))


def test_sgd_moves_between_steps() -> None:
    """Two steps by hand: values follow the change, slices and head at their own rates."""
    chosen = optimizer("sgd")
    chosen.step(SLOPES)
    # 1 - 0.1*0.5, -2 + 0.1*1; 0.5 - 0.01*1, 0 - 0.01*2
    np.testing.assert_allclose(chosen.values()["a/core"], [[[0.95, -1.9]]], rtol=1e-6)
    np.testing.assert_allclose(chosen.values()["head/bias"], [0.49, -0.02], rtol=1e-6)
    chosen.step({"a/core": np.array([[[2.0, 0.0]]], dtype=np.float32)})
    # 0.95 - 0.1*2
    np.testing.assert_allclose(chosen.values()["a/core"], [[[0.75, -1.9]]], rtol=1e-6)
    np.testing.assert_allclose(chosen.delta()["a/core"], [[[-0.25, 0.1]]], rtol=1e-5)


def test_adamw_normalises_each_entry() -> None:
    """The first two steps by hand.

    First step: m/(1-0.9) = g and v/(1-0.999) = g², so each entry moves by the rate against its sign. Second
    step with g₁ = 0.5, g₂ = -1 (first entry): m = 0.9*0.05 - 0.1 = -0.055, m̂ = -0.055/0.19 = -0.289474;
    v = 0.999*0.00025 + 0.001 = 0.00124975, v̂ = 0.00124975/0.001999 = 0.625188; step = -m̂/sqrt(v̂) = +0.366105.
    """
    chosen = optimizer("adamw")
    chosen.step(SLOPES)
    np.testing.assert_allclose(chosen.delta()["a/core"], [[[-0.1, 0.1]]], rtol=1e-5)
    np.testing.assert_allclose(chosen.delta()["head/bias"], [-0.01, -0.01], rtol=1e-5)
    chosen.step({"a/core": np.array([[[-1.0, -1.0]]], dtype=np.float32)})
    np.testing.assert_allclose(chosen.delta()["a/core"], [[[-0.1 + 0.0366105, 0.2]]], rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_untouched_tensors_stay_bit_identical(name: str) -> None:
    """What is not trained is handed on as it came; what is trained but gets no gradient has change zero."""
    chosen = optimizer(name)
    for _ in range(3):
        chosen.step({"a/core": SLOPES["a/core"]})
    assert chosen.values()["b/core"] is START["b/core"]
    assert np.array_equal(chosen.values()["head/bias"], START["head/bias"])
    assert set(chosen.delta()) == set(SLOPES)
    assert not chosen.delta()["head/bias"].any()


@pytest.mark.parametrize("name", KINDS)
def test_the_start_is_never_modified(name: str) -> None:
    """The values a task came with, and the gradients given, are left alone."""
    before = {key: value.copy() for key, value in START.items()}
    given_ = {key: value.copy() for key, value in SLOPES.items()}
    chosen = optimizer(name)
    for _ in range(3):
        chosen.step(given_)
    for key, value in before.items():
        assert np.array_equal(START[key], value)
    for key, value in SLOPES.items():
        assert np.array_equal(given_[key], value)


@pytest.mark.parametrize("name", KINDS)
def test_everything_stays_float32(name: str) -> None:
    """Changes and values keep single precision, whatever the rates are."""
    chosen = optimizer(name)
    chosen.step(SLOPES)
    assert {v.dtype for v in (*chosen.delta().values(), *chosen.values().values())} == {np.dtype(np.float32)}


def test_a_full_sketch_is_adamw() -> None:
    """With as many numbers in a sketch as a slice has, the compressed moments make the steps of AdamW."""
    chance, start = np.random.default_rng(5), {"a/core": np.zeros((1, 4, 5), np.float32)}
    settings = LocalOptimizer("sgc", 0.1, 0.01)
    compressed = make_optimizer(settings, start, ["a/core"], Sketch(20, 20, 3))
    plain = make_optimizer(LocalOptimizer("adamw", 0.1, 0.01), start, ["a/core"])
    for _ in range(4):
        slope = chance.standard_normal((1, 4, 5)).astype(np.float32)
        compressed.step({"a/core": slope})
        plain.step({"a/core": slope})
    # The smallest of the second moments is what is left of larger ones.
    np.testing.assert_allclose(compressed.delta()["a/core"], plain.delta()["a/core"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", [40, 400])
def test_the_state_of_compressed_moments_does_not_depend_on_the_slice(side: int) -> None:
    """Two float32 numbers for each of a sketch's, whatever the slice; a step moves its largest entries alone."""
    start = {"a/core": np.zeros((1, side, 3), np.float32)}
    chosen = make_optimizer(LocalOptimizer("sgc", 0.1, 0.01), start, ["a/core"], Sketch(56, 4, 1))
    slope = np.random.default_rng(2).standard_normal((1, side, 3)).astype(np.float32)
    chosen.step({"a/core": slope})
    state = chosen.state()
    assert sum(state[f"{moment}/a"].nbytes for moment in ("first", "second")) == 2 * 56 * 4
    moved = np.flatnonzero(chosen.delta()["a/core"])
    assert set(moved) == set(np.argsort(-np.abs(slope).ravel())[:4])
    np.testing.assert_allclose(
        chosen.delta()["a/core"].ravel()[moved], -0.1 * np.sign(slope.ravel()[moved]), rtol=1e-4
    )


def test_compressed_moments_need_a_size_and_come_back() -> None:
    """Without a sketch the rule is refused; from its state, another goes on with the same bits, the head included."""
    with pytest.raises(ConfigError, match="set sketch_size and sketch_entries"):
        optimizer("sgc")
    first, second = (
        make_optimizer(LocalOptimizer("sgc", 0.1, 0.01), START, list(SLOPES), Sketch(2, 2, 1))
        for _ in range(2)
    )
    first.step(SLOPES)
    second.restore({name: array.copy() for name, array in first.state().items()})
    for chosen in (first, second):
        chosen.step(SLOPES)
    for name, moved in first.delta().items():
        assert moved.tobytes() == second.delta()[name].tobytes()
        assert moved.any()


def test_no_step_is_divided_by_next_to_nothing() -> None:
    """Gradients at ever other places leave second moments that a sketch cannot tell: steps stay as Adam's may be."""
    chance, start = np.random.default_rng(3), {"a/core": np.zeros((1, 12, 10), np.float32)}
    chosen = make_optimizer(LocalOptimizer("sgc", 1.0, 1.0), start, ["a/core"], Sketch(14, 2, 0))
    for _ in range(30):
        before = chosen.delta()["a/core"].copy()
        chosen.step({"a/core": chance.standard_normal((1, 12, 10)).astype(np.float32)})
        assert np.abs(chosen.delta()["a/core"] - before).max() < 7.3  # √(0.1² / 0.001 / (1 - 0.81 / 0.999))
