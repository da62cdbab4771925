"""How long a simulated device works."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.simulation.config import DropoutConfig, SpeedConfig
from coordinator.simulation.fleet import Fleet
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.packages import make_manifest


@pytest.mark.parametrize(
    ("changes", "rows", "examples"),
    [
        ({"steps": 5}, 100, 5 * 8),
        ({"steps": 5}, 3, 5 * 3),
        ({"steps": 1000, "epochs": 1}, 100, 13 * 8),
        ({"steps": 4, "epochs": 1}, 100, 4 * 8),
    ],
    ids=["steps", "few rows", "an epoch", "an epoch cut short"],
)
def test_time_follows_the_examples_of_a_task(changes: dict[str, int], rows: int, examples: int) -> None:
    """A task takes the overhead and, an example, one pass and one for each draw; epochs may end before its steps do."""
    speed = SpeedConfig(overhead_s=2.0, seconds_per_example=0.125, spread="equal")
    fleet = Fleet([np.arange(rows)], speed, DropoutConfig(), seed=0)
    (device,) = fleet.devices.values()
    task = replace(TASK, batch_size=8, draws=3, **changes)
    assert fleet.duration_s(task, make_manifest(), device) == 2.0 + examples * 4 * 0.125
