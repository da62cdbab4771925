"""Runs whose noise cannot be, or says nothing: refused before the run, with numbers and a way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from coordinator.aggregation.accountant import epsilon_of
from coordinator.config import PrivacyConfig
from coordinator.rounds.noise_check import with_noise
from coordinator.rounds.private_rounds import noise_key
from coordinator.rounds.runs import find_run
from tests.coordinator.conftest import World
from tests.coordinator.rounds.test_private_rounds import FAINT, WHOLE, private_fleet


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"privacy": {}}, "give one of them"),
        ({"privacy": {"noise_multiplier": 1.0, "epsilon": 1.0}}, "give one of them"),
        ({"privacy": {"noise_multiplier": 1000.0}}, "the noise drowns what is learned"),
        ({"privacy": {**FAINT, "noise_seed": 1}}, "privacy.noise_seed = 1"),
        ({"privacy": {**FAINT, "unit": "row"}}, 'privacy.unit = "row"'),
        ({"privacy": {**FAINT, "most_rounds": 1}}, "privacy.most_rounds = 1"),
        ({"privacy": FAINT, "norm_limit": 30.0}, "norm_limit = 30"),
        ({"privacy": FAINT, "robust_mean": "median"}, "robust_mean"),
        ({"privacy": FAINT, "buffer_size": 2}, "buffer_size"),
        ({"privacy": FAINT, "split": "cyclic"}, "split"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(world: World, changed: dict[str, Any], words: str) -> None:
    """One line says what does not go together, or how large the noise would be; nothing is stored."""
    before = world.dump()
    table = {**world.config(**WHOLE, rounds=2), **changed}
    answer = world.admin("POST", "/v1/admin/runs", table)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["message"]
    assert "\n" not in answer.json()["message"]
    assert world.dump() == before


def test_the_way_out_of_noise_that_drowns_is_followed(world: World) -> None:
    """A run that was refused for its noise is taken with a larger epsilon."""
    base = world.config(**WHOLE, rounds=1)
    small = world.admin("POST", "/v1/admin/runs", {**base, "privacy": {"epsilon": 0.05}})
    assert "allow a larger epsilon" in small.json()["message"]
    assert world.admin("POST", "/v1/admin/runs", {**base, "privacy": {"epsilon": 8.0}}).status_code == 201
    multiplier = world.run()["privacy"]["noise_multiplier"]
    assert epsilon_of(PrivacyConfig(noise_multiplier=multiplier), 1) <= 8.0 + 1e-6


def test_noise_is_secret_and_of_a_simulation_repeats(world: World) -> None:
    """A real run's key is drawn anew each time; a simulation's follows from its seed and the round."""
    private_fleet(world, "a", "b", "c")
    run_id = world.create_run(**WHOLE, rounds=1, privacy=FAINT)
    with world.stores.storage.reading() as connection:
        run = find_run(world.stores, connection, run_id)
    assert noise_key(run, 0) != noise_key(run, 0)
    simulated = with_noise(run.config, run.manifest, ("s0",), simulated=True)
    again = dataclasses.replace(run, config=simulated)
    assert noise_key(again, 0) == noise_key(again, 0) != noise_key(again, 1)
