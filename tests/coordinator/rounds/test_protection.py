"""What tasks ask devices to do to their contributions."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.rounds.protection import needs_protection, protection_of
from coordinator.rounds.runs import find_run
from edge_runtime.protocol.messages import Protection
from tests.coordinator.conftest import World

WHOLE: dict[str, Any] = {"devices_per_round": 10, "min_devices": 3, "min_results": 3, "split": "whole"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"privacy": {"noise_multiplier": 0.1, "clip_norm": 2.0}}, Protection(2.0)),
        ({"privacy": {"noise_multiplier": 0.1, "clip_norm": 2.0, "where": "device"}}, Protection(2.0, 0.2)),
        (
            {"secure_aggregation": True, "secure_range": 4.0},
            Protection(None, 0.0, 32, 4.0 / 214748364, 214748364),
        ),
        (
            {"secure_aggregation": True, "privacy": {"noise_multiplier": 0.1, "clip_norm": 2.0}},
            Protection(2.0, 0.0, 32, 2.0 / 214748364, 214748364),
        ),
        (
            {"secure_aggregation": True, "head": "closed_form", "slices": "none", "rounds": 0},
            Protection(None, 0.0, 64, 2.0**-30, 922337203685477580),
        ),
    ],
)
def test_protection_follows_from_the_configuration(
    world: World, changed: dict[str, Any], expected: Protection | None
) -> None:
    """Clipping, noise, bits and range are those that the run asks for; ten integers add up without a wrap."""
    run_id = world.create_run(**WHOLE, **changed)
    with world.stores.storage.reading() as connection:
        run = find_run(world.stores, connection, run_id)
    assert protection_of(run) == expected
    assert needs_protection(run) == (expected is not None)
