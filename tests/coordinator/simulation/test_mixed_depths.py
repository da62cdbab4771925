"""Fleets whose devices leave the model at unlike depths, by the caps that they grant; and fleets that grow."""

from __future__ import annotations

import json

import msgspec
import pytest

from coordinator.config import RunConfig, run_config
from coordinator.rounds import tasks
from coordinator.rounds.memory_requirements import exits_for, reached, required_bytes
from coordinator.simulation.cost import forward_passes_per_example
from coordinator.simulation.record import Record
from edge_runtime.errors import ConfigError
from edge_runtime.package.block_head import with_block_head
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.simulation.conftest import Workshop
from tests.coordinator.simulation.mixed_caps import handed_out, simulate_mixed
from tests.edge_runtime.exit_model import FIRST, SECOND, write_exit_model
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.memory.test_plan import ALL, MODEL

CAP = 512 << 20
RUN = {
    "exits": [1, 2],
    "rounds": 3,
    "devices_per_round": 6,
    "steps": 3,
    "draws": 4,
    "train_head": True,
    "directions": "one_slice",
    "server_optimizer": {
        "slices": {"name": "sgd", "rate": 0.05},
        "head": {"name": "sgd", "rate": 0.05},
    },
}


@pytest.fixture
def layered(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop with the model of two blocks, so small that a rule in place of the planner's gives half a cap one."""
    (workshop.folder / "layered").mkdir()
    write_exit_model(workshop.folder / "layered", generate_key())
    for name in ("train", "dev"):
        path = workshop.folder / f"{name}.jsonl"
        rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        labelled = [{"text": text, "label": "home" if "home" in text else "away"} for text in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in labelled))

    def by_cap(manifest: object, config: RunConfig, slices: object, cap_bytes: int) -> tuple[int, ...]:
        return config.exits if cap_bytes == CAP else config.exits[:1]

    monkeypatch.setattr(tasks, "exits_for", by_cap)
    return workshop


def simulate(workshop: Workshop, output: str, half: float = 1 / 3, **run: object) -> Record:
    """Six devices, of which a share grants half the cap."""
    return simulate_mixed(workshop, "layered", output, half, {**RUN, **run})


def test_a_fleet_grows_to_more_blocks(layered: Workshop) -> None:
    """The second block's slice is trained alone, in fewer passes, then both; scalars come to the bits of weights."""
    growing = {"exits": [], "features": [2], "rounds": 4, "grow_at": [2]}
    record = simulate(layered, "out", **growing)
    found = {(task.round, task.slices) for task in handed_out(layered.folder / "out")}
    assert found == {(0, (SECOND,)), (1, (SECOND,)), (2, (FIRST, SECOND)), (3, (FIRST, SECOND))}
    scalars = simulate(layered, "scalars", **growing, report="scalars")
    assert scalars.values_sha256 == record.values_sha256
    assert record.points[-1].train_loss < record.points[0].loss


def test_devices_of_half_the_cap_take_part_at_a_shallow_exit(layered: Workshop) -> None:
    """One device in three has one block: it trains that block's slice, in fewer passes, and the run ends alike."""
    record = simulate(layered, "out")
    found = handed_out(layered.folder / "out")
    kinds = {(task.exits, task.features, task.slices) for task in found}
    assert kinds == {((1,), (1,), (FIRST,)), ((1, 2), (2,), (FIRST, SECOND))}
    assert sum(task.exits == (1,) for task in found) == 6
    assert simulate(layered, "again").values_sha256 == record.values_sha256
    assert record.points[-1].train_loss < record.points[0].loss
    whole = simulate(layered, "whole", half=0.0)
    assert record.points[-1].forward_passes < whole.points[-1].forward_passes


def test_a_head_warms_up_at_all_exits(layered: Workshop) -> None:
    """In rounds that train the head alone, devices leave at their exits all the same."""
    simulate(layered, "warm", head_warm_up_rounds=1)
    found = handed_out(layered.folder / "warm")
    assert {(task.exits, task.slices) for task in found if task.round == 0} == {((1,), ()), ((1, 2), ())}


def test_scalars_come_to_the_same_values(layered: Workshop) -> None:
    """Devices that send their jvps alone end the run with the bits of devices that send their changes."""
    weights, scalars = (simulate(layered, kind, report=kind) for kind in ("weights", "scalars"))
    assert scalars.values_sha256 == weights.values_sha256


def test_exits_go_with_whole_places_alone(layered: Workshop) -> None:
    """A run that deals slices out, and one whose exit is not there, are refused before a device is asked."""
    for run, message in (({"split": "cyclic"}, 'take split = "whole"'), ({"exits": [1, 5]}, "to 2")):
        with pytest.raises(ConfigError, match=message):
            layered.simulate(
                run={**RUN, **run}, fleet={"devices": 6}, arms=[{"name": "arm", "package": "layered"}]
            )


def test_the_deepest_exit_that_fits_is_given() -> None:
    """A device has all exits up to the deepest whose plan its cap admits, and the first at least."""
    exits = (1, 2, 4)
    table = {
        "name": "e",
        "package": "p",
        "publisher_key": "A" * 43 + "=",
        "exits": list(exits),
        **dict.fromkeys(("seed", "rounds", "steps", "batch_size", "devices_per_round"), 2),
    }
    config = run_config(table)
    seen = with_block_head(MODEL, (4,))
    needs = [required_bytes(seen, config, ALL, leave=leave) for leave in exits]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]
    assert required_bytes(seen, config, ALL) == needs[0]
    assert exits_for(seen, config, ALL, needs[-1]) == exits
    assert exits_for(seen, config, ALL, needs[-1] - 1)[-1] < exits[-1]
    assert exits_for(seen, config, ALL, 1) == (1,)
    assert set(reached(seen, ALL, 1)) < set(ALL)


def test_a_pass_to_an_exit_counts_by_its_blocks() -> None:
    """Half of the blocks are half a pass: a task that draws among exits costs the mean of them."""
    blocks = len(MODEL.segments) - 2
    task = msgspec.structs.replace(
        TASK, slices=ALL[:1], directions="shared", update="forward", train_head=False
    )
    whole = forward_passes_per_example(task, MODEL)
    half = msgspec.structs.replace(task, exits=(blocks // 2,))
    assert forward_passes_per_example(half, MODEL) == pytest.approx(whole * (blocks // 2) / blocks)
