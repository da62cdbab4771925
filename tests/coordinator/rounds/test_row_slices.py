"""Fleets that train rows of a weight, chosen by the coordinator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.coordinator.hand_made import slice_spec
from coordinator.rounds.deltas import check_delta
from coordinator.simulation.record import Record
from edge_runtime.errors import ConfigError, SliceError
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import World
from tests.coordinator.simulation.conftest import Workshop
from tests.coordinator.simulation.mixed_caps import simulate_mixed
from tests.edge_runtime.bigram import SLICE
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.rows_bigram import PLACE, ROWS, SPEC, write_rows_bigram

RUN = {
    "rounds": 4,
    "devices_per_round": 3,
    "steps": 2,
    "draws": 8,
    "row_refresh": 2,
    "server_optimizer": {"slices": {"name": "sgd", "rate": 0.02}},
}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A fresh folder."""
    return Workshop(tmp_path)


@pytest.fixture
def rows(workshop: Workshop) -> Workshop:
    """A workshop with the model that trains rows."""
    (workshop.folder / "rows").mkdir()
    write_rows_bigram(workshop.folder / "rows", generate_key())
    return workshop


def simulate(workshop: Workshop, output: str, **run: object) -> Record:
    """Six devices, of which one in three grants half the cap."""
    return simulate_mixed(workshop, "rows", output, 1 / 3, {**RUN, **run})


@pytest.mark.parametrize("choice", ["norm", "topk", "uniform"])
def test_devices_train_the_rows_that_the_task_brings(rows: Workshop, choice: str) -> None:
    """A run learns through a change of rows, and scalars come to the bits of weights."""
    record = simulate(rows, "weights", row_choice=choice)
    scalars = simulate(rows, "scalars", row_choice=choice, report="scalars")
    assert scalars.values_sha256 == record.values_sha256
    assert record.points[-1].loss < record.points[0].loss


def test_what_a_device_was_not_given_to_train_is_refused(rows: Workshop) -> None:
    """A change of the rows alone is taken; one of other shape, and any of which rows they are, is refused by name."""
    manifest = Package.open_unsigned(rows.folder / "rows").manifest
    task = replace(TASK, slices=(SLICE,), train_head=False)
    good = {ROWS: np.zeros((1, 2, 6), np.float32)}
    check_delta(manifest, task, encode_values(good))
    for change, message in (
        ({PLACE: np.zeros((1, 6, 2), np.float32)}, f"unknown slice tensor {PLACE}"),
        ({ROWS: np.zeros((1, 3, 6), np.float32)}, f"{ROWS} is float32"),
    ):
        with pytest.raises(SliceError, match=message):
            check_delta(manifest, task, encode_values({**good, **change}))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"buffer_size": 3}, "leave it out, or set row_refresh = 0"),
        ({"directions": "filtered", "candidates": 2}, 'take "one_slice"'),
        ({"gate_variance": 1.0, "min_results": 2}, "leave it out"),
    ],
)
def test_what_compares_rounds_does_not_go_with_other_rows(rows: Workshop, run: dict, message: str) -> None:
    """Settings that hold changes of several rounds against each other are refused before a device is asked."""
    with pytest.raises(ConfigError, match=message):
        rows.simulate(run={**RUN, **run}, fleet={"devices": 6}, arms=[{"name": "arm", "package": "rows"}])


@pytest.mark.parametrize("run", [{"row_refresh": 2}, {"row_refresh": None, "row_choice": "topk"}])
def test_rows_of_a_package_without_any_are_refused(workshop: Workshop, run: dict) -> None:
    """A choice of rows for a package that has none names the key, and the way out is taken."""
    with pytest.raises(ConfigError, match="trains none: export it with --slice rows, or leave row_"):
        workshop.simulate(run=run)
    assert np.isfinite(workshop.simulate(run={"rounds": 1})[0].points[-1].loss)


def rounds(folder: Path, killed: bool) -> bytes:
    """The values after four rounds that choose rows twice, with the coordinator killed around each choice or not."""
    folder.mkdir()
    world = World(folder, None, (SPEC, slice_spec("head", 1, (1, 2, 2), "head")))
    devices = world.fleet("a", "b", "c")
    world.create_run(rounds=4, row_refresh=2, seed=5)
    for number in range(4):
        world.play()
        if killed and number in (1, 2):
            world.start()
            world.play()
        world.work(devices)
    assert world.run()["state"] == "finished"
    world.stores.storage.close()
    return world.values()


def test_a_killed_coordinator_chooses_the_same_rows(tmp_path: Path) -> None:
    """Killed before and after rows are chosen, a coordinator ends with the bytes of one that was not."""
    assert rounds(tmp_path / "plain", killed=False) == rounds(tmp_path / "killed", killed=True)
