"""Simulated runs with privacy repeat to the last bit; masks are refused, for they change no curve."""

from __future__ import annotations

import pytest

from coordinator.simulation.config import read_simulation_config
from edge_runtime.errors import ConfigError
from tests.coordinator.simulation.conftest import Workshop


def test_noise_of_a_simulation_follows_from_its_seed(workshop: Workshop) -> None:
    """Equal seeds end in equal values with noise by server and devices; noise changes them."""
    run = {"rounds": 1, "evaluation": {"every_rounds": 1}}
    ended = {}
    for output, where in (("one", "server"), ("again", "server"), ("devices", "device")):
        privacy = {"where": where, "noise_multiplier": 0.3, "clip_norm": 0.5}
        (record,) = workshop.simulate(output, run={**run, "privacy": privacy})
        assert record.status == "finished", record.reason
        ended[output] = record.values_sha256
    assert ended["one"] == ended["again"]
    assert len(set(ended.values())) == 2


def test_masks_are_refused(workshop: Workshop) -> None:
    """One line says why a simulation has none."""
    with pytest.raises(ConfigError, match="masks cancel to the bit"):
        read_simulation_config(
            workshop.write(run={"secure_aggregation": True, "min_results": 3, "split": "whole"})
        )
