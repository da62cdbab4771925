"""Two fleets that differ in what their devices send: the change, or the numbers it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.package import Package
from edge_runtime.slices import shapes
from tests.end_to_end.conftest import add_devices
from tests.end_to_end.harness import RUN, Fleet

#: What a safetensors file says of each tensor takes about a hundred bytes.
HEADER_BYTES = 600


def finished(folder: Path, package, **changes: object) -> tuple[bytes, float]:
    """A run by real processes: its final slices, and the mean bytes a task sent up."""
    with Fleet(folder, package) as fleet:
        fleet.create_run(**changes)
        add_devices(fleet)
        run = fleet.wait_until_finished()
        ups = [entry.bytes_up_per_task for entry in run.rounds]
        assert all(entry.bytes_up > entry.bytes_up_per_task for entry in run.rounds)
        return fleet.admin.slices(), sum(ups) / len(ups)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_bytes_from_numbers_alone(workshop, tmp_path, optimizer: str) -> None:
    """Whether devices send weights or scalars, the final slices are the same to the last bit; scalars are fewer."""
    package = workshop.package("lora")
    local = {"name": optimizer, "slice_rate": 0.01, "head_rate": 0.01}
    slices, sent = {}, {}
    for report in ("weights", "scalars"):
        changes = {"local_optimizer": local, "report": report}
        slices[report], sent[report] = finished(tmp_path / report, package, **changes)
    assert slices["scalars"] == slices["weights"]

    manifest = Package.open(package.folder, package.publisher_key).manifest
    numbers = {spec.name: spec.dimensions for spec in manifest.slices}
    head = numbers.pop("head")
    half = sum(numbers.values()) / 2  # two places share the slices
    steps, numbers_a_step = RUN["steps"], RUN["draws"] * RUN["batch_size"] + 1
    print(
        f"bytes up a task: weights {sent['weights']:.0f}, scalars {sent['scalars']:.0f}, of it head {4 * head}"
    )
    assert len(shapes(manifest.slices)) == 10
    assert 0 < sent["weights"] - 4 * (head + half) < HEADER_BYTES
    assert 0 < sent["scalars"] - 4 * (head + steps * numbers_a_step) < HEADER_BYTES
    assert sent["scalars"] < sent["weights"] / 2
