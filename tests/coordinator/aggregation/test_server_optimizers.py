"""The server's optimisers against traces worked by hand, and their defining properties."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.aggregation.server_optimizers import Moments, step
from coordinator.config import ServerOptimizerConfig

# x starts at 1, the averaged deltas are 1, -2, 0.5; rate 0.1, beta1 0.5, beta2 0.75, tau 0.5
# (so v starts at 0.25).
# m: 0.5, -0.75, -0.125 in all of them.
DELTAS = (1.0, -2.0, 0.5)
TRACES = {
    # v = v + D^2: 1.25, 5.25, 5.5
    # x += 0.05 / (sqrt(1.25) + 0.5)
    # x -= 0.075 / (sqrt(5.25) + 0.5)
    # x -= 0.0125 / (sqrt(5.5) + 0.5)
    "adagrad": ((1.25, 5.25, 5.5), (1.030901699, 1.004031089, 0.999637726)),
    # v - D^2 < 0: 0.25 + 0.25 * 1 = 0.5; 0.5 + 0.25 * 4 = 1.5; v - D^2 > 0: 1.5 - 0.25 * 0.25 = 1.4375
    # x += 0.05 / (sqrt(0.5) + 0.5)
    # x -= 0.075 / (sqrt(1.5) + 0.5)
    # x -= 0.0125 / (sqrt(1.4375) + 0.5)
    "yogi": ((0.5, 1.5, 1.4375), (1.041421356, 0.997936866, 0.990578)),
    # v: 0.75 * 0.25 + 0.25 * 1 = 0.4375; 0.328125 + 1 = 1.328125; 0.99609375 + 0.0625 = 1.05859375
    # x += 0.05 / (sqrt(0.4375) + 0.5)
    # x -= 0.075 / (sqrt(1.328125) + 0.5)
    # x -= 0.0125 / (sqrt(1.05859375) + 0.5)
    "adam": ((0.4375, 1.328125, 1.05859375), (1.043050087, 0.997664, 0.989487)),
    # x += 0.1 m
    "momentum": ((0.25, 0.25, 0.25), (1.05, 0.975, 0.9625)),
    # x += 0.1 D
    "sgd": ((0.25, 0.25, 0.25), (1.1, 0.9, 0.95)),
}


def test_every_optimiser_has_a_trace() -> None:
    """Whatever a run may name is worked by hand here, so that no name runs by another's formula."""
    assert set(TRACES) == set(get_args(get_type_hints(ServerOptimizerConfig)["name"]))


@pytest.mark.parametrize("name", TRACES)
def test_three_steps_by_hand(name: str) -> None:
    """Each rule reproduces its trace of Algorithm 2 worked by hand."""
    config = ServerOptimizerConfig(name, rate=0.1, beta1=0.5, beta2=0.75, tau=0.5)  # type: ignore[arg-type]
    x, moments = np.ones(1, np.float32), Moments.initial((1,), config)
    for delta, v, expected in zip(DELTAS, *TRACES[name], strict=True):
        x, moments = step(x, np.array([delta]), moments, config)
        assert moments.v[0] == pytest.approx(v, rel=1e-12)
        assert x[0] == pytest.approx(expected, rel=2e-6)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8))
def test_sgd_at_rate_one_is_fedavg(deltas: list[float]) -> None:
    """SGD at rate 1 moves the values by the mean delta itself."""
    x = np.linspace(-1, 1, len(deltas), dtype=np.float32)
    config = ServerOptimizerConfig()
    moved, _ = step(x, np.array(deltas), Moments.initial(x.shape, config), config)
    assert np.array_equal(moved, (x.astype(np.float64) + deltas).astype(np.float32))


@given(
    st.floats(0, 1e6),
    st.floats(-1e3, 1e3),
    st.floats(0, 0.999),
)
def test_yogi_moves_v_slowly(v: float, delta: float, beta2: float) -> None:
    """Yogi's v changes by at most (1 - beta2) D^2, however far apart the two are."""
    config = ServerOptimizerConfig("yogi", beta2=beta2)
    moments = Moments(np.zeros(1), np.array([v]))
    _, after = step(np.zeros(1, np.float32), np.array([delta]), moments, config)
    assert abs(after.v[0] - v) <= (1 - beta2) * delta**2 * (1 + 1e-9) + 1e-9 * v


@pytest.mark.parametrize("name", ["adagrad", "yogi", "adam"])
def test_adaptive_steps_win_on_a_badly_scaled_bowl(name: str) -> None:
    """On a quadratic whose curvatures spread over a factor of 1e3, adaptive steps get further in 100 rounds than SGD.

    f(x) = 1/2 sum h x^2, deltas are -h x, both from x = 1. SGD is at its best rate, 2 / (h_min + h_max).
    """
    curvature = np.geomspace(1e-3, 1.0, 10)

    def loss_after(config: ServerOptimizerConfig) -> float:
        x = np.ones(10, np.float32)
        moments = Moments.initial(x.shape, config)
        for _ in range(100):
            x, moments = step(x, -curvature * x, moments, config)
        return float(0.5 * (curvature * x.astype(np.float64) ** 2).sum())

    best_sgd = loss_after(ServerOptimizerConfig("sgd", rate=2 / (curvature[0] + curvature[-1])))
    assert loss_after(ServerOptimizerConfig(name, rate=0.1, beta1=0.0, tau=1e-3)) < 0.5 * best_sgd  # type: ignore[arg-type]
