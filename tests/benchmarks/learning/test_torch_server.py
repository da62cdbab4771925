"""The server of fleets in torch, and the decoder's shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.learning.arms import ADAM
from benchmarks.learning.decoder import rows
from benchmarks.learning.torch_fleet import RoundGradients
from benchmarks.learning.torch_server import TorchServer
from coordinator.config import ServerOptimizerConfig
from tests.benchmarks.learning.test_run import losses

#: A fleet's sizes: two cores' entries, three classes, two features.
SIZES: Any = SimpleNamespace(size=2, classes=3, width=2)
FOUND = RoundGradients(
    np.zeros((2, 2), np.float32),
    np.ones(2),
    np.array([[1, -1, 0], [0, 1, -1]], np.float32),
    np.array([[1, 0], [0, 2]], np.float32),
)
PLAIN = ServerOptimizerConfig("sgd", rate=0.5)


def test_a_step_goes_against_the_gradients() -> None:
    """Plain steps at a share of the rate: cores by what is given, the head by its exact mean gradient."""
    server = TorchServer(SIZES, PLAIN, PLAIN)
    server.move(np.array([1.0, -2.0], np.float32), FOUND, 0.5)
    np.testing.assert_allclose(server.cores, [-0.25, 0.5])
    np.testing.assert_allclose(server.weight, [[-0.125, 0], [0.125, -0.25], [0, 0.25]])
    np.testing.assert_allclose(server.bias, [-0.125, 0, 0.125])


def test_a_head_without_an_optimiser_stays_and_a_rate_may_be_given() -> None:
    """The solved head is left as it is, and a rate in place of the optimiser's own holds for the cores alone."""
    server = TorchServer(SIZES, ServerOptimizerConfig(**ADAM), None)
    server.move(np.array([1.0, -1.0], np.float32), FOUND, 1.0, rate=0.1)
    np.testing.assert_allclose(server.cores, [-0.1, 0.1], rtol=1e-3)
    assert not server.weight.any() and not server.bias.any()


def test_a_decoder_is_told_beside_exact_gradients_and_lora() -> None:
    """Of 4 nats by exact gradients and 5 by LoRA, 3.8 are taken off by 8 draws: 95 % and 76 %."""
    ends = {"decks": 1.2, "backprop": 1.0, "lora8": 0.0}
    table = rows({name: losses(name, [5.0, end]) for name, end in ends.items()})
    shares = {row.name.rpartition("over ")[2]: row for row in table if row.reach}
    exact, lora = (shares[name] for name in shares)
    assert (exact.value, exact.met) == (pytest.approx(95.0), True)
    assert (lora.value, lora.met) == (pytest.approx(76.0), False)
