"""Sketches of changes: averaged as they are, and the mean change found in their mean."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import server_update
from coordinator.config import RunConfig, run_config
from coordinator.simulation.record import Record
from edge_runtime.errors import ConfigError
from edge_runtime.package.slices import shapes
from edge_runtime.training.sketch import sketch_of, sketched
from tests.coordinator.conftest import LORA_SPECS
from tests.coordinator.simulation.conftest import Workshop

SLICES = [spec for spec in LORA_SPECS if spec.kind != "head"]
#: A core of 36 numbers, of which two or, of all, five are found.
RUN = {"report": "sketch", "sketch_size": 14, "sketch_entries": 2}


def config(**changes: object) -> RunConfig:
    """A run whose devices send sketches."""
    table = {"name": "r", "package": "p", "publisher_key": "A" * 43 + "=", "rounds": 4}
    table |= dict.fromkeys(("seed", "steps", "batch_size", "devices_per_round"), 1)
    return run_config({**table, **RUN, **changes})


def test_the_server_steps_along_the_mean_change() -> None:
    """Changes at the same places come out of the mean of their sketches, weighed by examples; the head is as sent."""
    settings, chance = config(), np.random.default_rng(2)
    values = {name: np.zeros(shape, np.float32) for name, shape in shapes(LORA_SPECS).items()}
    contributions, changes = [], []
    for slot, examples in enumerate((1, 3)):
        change = {name: np.zeros_like(array) for name, array in values.items()}
        for name in ("l0/A", "l0/B", "l1/A"):
            change[name].flat[3] = chance.standard_normal()
        change["head/core"] += slot + 1
        changes.append((examples, change))
        contributions.append(Contribution(examples, sketched(change, SLICES, sketch_of(settings)), slot=slot))
    update = server_update(
        values, ServerState(), contributions, config=settings, specs=LORA_SPECS, round_number=0, committed=0
    )
    for name in values:
        mean = sum(examples * change[name] for examples, change in changes) / 4
        np.testing.assert_allclose(update.values[name], mean, atol=1e-5, err_msg=name)


def simulate(workshop: Workshop, output: str, **run: object) -> Record:
    """Four rounds of three devices."""
    optimizer = {"slices": {"name": "sgd", "rate": 0.1}}
    changed = {"rounds": 4, "draws": 8, "server_optimizer": optimizer, **RUN, **run}
    (record,) = workshop.simulate(output, run=changed, fleet={"half_cap": 1 / 3})
    assert record.status == "finished", record.reason
    return record


def test_a_fleet_that_sends_sketches_learns(tmp_path) -> None:
    """Loss falls, fewer bytes travel up than for whole changes, and the same run ends with the same values."""
    workshop = Workshop(tmp_path)
    record = simulate(workshop, "sketches")
    assert record.points[-1].loss < record.points[0].loss
    assert simulate(workshop, "again").values_sha256 == record.values_sha256
    whole = simulate(workshop, "whole", report="weights", sketch_size=None, sketch_entries=None)
    assert record.points[-1].bytes_up < whole.points[-1].bytes_up


def test_compressed_moments_train_by_weights_scalars_and_sketches(tmp_path) -> None:
    """SGC as the devices' optimiser learns, and scalars come to the bits of weights."""
    workshop = Workshop(tmp_path)
    local = {"local_optimizer": {"name": "sgc", "slice_rate": 0.1}, "directions": "shared"}
    local |= {"server_optimizer": {"slices": {"name": "sgd", "rate": 1.0}}}
    found = {
        kind: simulate(workshop, kind, report=kind, **local) for kind in ("weights", "scalars", "sketch")
    }
    assert found["weights"].values_sha256 == found["scalars"].values_sha256
    for record in found.values():
        assert record.points[-1].loss < record.points[0].loss


@pytest.mark.parametrize(
    ("changes", "message", "way_out"),
    [
        ({"sketch_size": 13}, "take sketch_size = 14 or sketch_entries = 1", {"sketch_size": 14}),
        ({"sketch_size": 0}, 'report = "sketch" needs sketch_size', {"sketch_size": 21}),
        ({"sketch_entries": 0}, "take sketch_entries = 2", {"sketch_entries": 2}),
        ({"report": "weights"}, "set one, or leave it out", {"report": "sketch"}),
        ({"report": "weights", "sketch_size": 0}, "needs a sketch_size of at least 14", {"report": "sketch"}),
        ({"update": "best", "draws": 2}, 'take report = "weights"', {"update": "forward"}),
        ({"rank_mode": "dynamic"}, 'take report = "weights"', {"rank_mode": "fixed"}),
        ({"robust_mean": "median"}, 'take "none" or "clipped"', {"robust_mean": "clipped"}),
        ({"lora_aggregation": "product_svd"}, '"factors" or "frozen_a"', {"lora_aggregation": "frozen_a"}),
    ],
)
def test_what_sketches_do_not_go_with_is_refused(changes: dict, message: str, way_out: dict) -> None:
    """Too short a sketch, and what looks into a change, are one line each, and the way out that it names is taken."""
    if changes.get("lora_aggregation"):
        changes = {**changes, "server_optimizer": {"slices": {"name": "sgd", "rate": 1.0}}}
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert config(**{**changes, **RUN, **way_out}).report == "sketch"


def test_a_sketch_larger_than_a_slice_is_refused(tmp_path) -> None:
    """A core of 36 numbers is not sketched to 42; what the message names is taken. So is SGC without any size."""
    workshop = Workshop(tmp_path)
    with pytest.raises(ConfigError, match=r"sketch_size = 42 is more than the 36 numbers .* take at most 36"):
        simulate(workshop, "out", sketch_size=42)
    assert simulate(workshop, "out", sketch_size=36).points
    with pytest.raises(ConfigError, match="set sketch_size and sketch_entries"):
        config(report="weights", sketch_size=0, sketch_entries=0, local_optimizer={"name": "sgc"})
