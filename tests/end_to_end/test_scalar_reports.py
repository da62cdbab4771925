"""Two fleets that differ in what their devices send: the change, or the numbers it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.package.package import Package
from edge_runtime.package.slices import shapes
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


METHODS: dict[str, dict[str, object]] = {
    "Spry as published": {
        "directions": "gaussian",
        "head": "perturbed",
        "head_split": True,
        "local_optimizer": {"name": "adamw", "slice_rate": 1e-3, "head_rate": 1e-3},
        "server_optimizer": {
            "slices": {"name": "yogi", "rate": 0.01},
            "head": {"name": "yogi", "rate": 0.01},
        },
    },
    "zero order with a frozen A": {
        "update": "zero_order",
        "directions": "shared",
        "lora_aggregation": "frozen_a",
        "local_optimizer": {"name": "sgd", "slice_rate": 0.01, "head_rate": 0.01},
    },
    "FwdLLM": {
        "update": "zero_order",
        "directions": "filtered",
        "candidates": 5,
        "head": "perturbed",
        "split": "whole",
        "gate_variance": 1e-3,
        "local_optimizer": {"name": "accumulate", "slice_rate": 0.01, "head_rate": 0.01},
    },
    "whole, normalised, averaged": {
        "split": "whole",
        "epochs": 1,
        "steps": 3,
        "normalise_steps": True,
        "average_from_round": 1,
        "lora_aggregation": "product_svd",
        "local_optimizer": {"name": "sgd", "slice_rate": 0.01, "head_rate": 0.01},
    },
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_ends_in_the_same_bytes(workshop, tmp_path, method: dict[str, object]) -> None:
    """The same holds where the head is perturbed, A frozen, losses compared, or the server keeps more than values."""
    package = workshop.package("lora")
    weights, sent = finished(tmp_path / "weights", package, **method)
    scalars, fewer = finished(tmp_path / "scalars", package, **method, report="scalars")
    assert scalars == weights
    assert fewer < sent
