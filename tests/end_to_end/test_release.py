"""A run's result becomes a release: a device in the field fetches it without training, and predicts with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from edge_runtime.package.package import Package
from edge_runtime.serving.session import InferenceSession
from edge_runtime.serving.source import model_of_folder
from tests.end_to_end.harness import Device, Fleet, command
from tests.end_to_end.workshop import rows


def told(fleet: Fleet, device: str, code: str, number: int) -> str:
    """Wait for a device's event about a release, and return its message."""

    def look() -> str:
        with_code = fleet.query(f"SELECT message FROM events WHERE device = '{device}' AND code = '{code}'")  # noqa: S608
        found = [str(message) for (message,) in with_code if str(message).startswith(f"release {number}:")]
        return found[0] if found else ""

    return fleet.wait(f"{code} {number}", look)


def predict(device: Device, text: str) -> dict:
    """What the device's own command says of a text."""
    done = command("edge_runtime.cli", "predict", text, "--config", device.folder / "device.toml")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_device_in_the_field_uses_what_the_fleet_learned(undisturbed, workshop, tmp_path: Path) -> None:
    """It never trains, predicts with the run's values, and keeps them when a later release falls below its limit."""
    folder = tmp_path / "fleet"
    shutil.copytree(undisturbed.folder / "coordinator", folder / "coordinator")
    text = rows()[200]["text"]
    with Fleet(folder, workshop.package()) as fleet:
        field = fleet.add_device("field", rows()[200:216], train=False)
        nothing = command("edge_runtime.cli", "predict", text, "--config", field.folder / "device.toml")
        assert nothing.returncode == 11
        assert "edge-coordinator release publish" in nothing.stderr

        done = fleet.operate("release", "publish", "--lowest-accuracy", "0.01")
        assert done.returncode == 0, done.stderr
        assert "on the 16 rows here" in told(fleet, "field", "release_taken", 1)
        found = predict(field, text)
        assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
        expected = by_hand(workshop, undisturbed.slices, field, text, tmp_path)
        assert found["label"] == expected.label
        np.testing.assert_allclose(
            list(found["probabilities"].values()), list(expected.probabilities.values()), atol=1e-6
        )

        assert fleet.operate("release", "publish", "--round", "0", "--highest-loss", "0.0001").returncode == 0
        message = told(fleet, "field", "release_refused", 2)
        assert message.endswith("the device goes on with release 1")
        assert predict(field, text) == found
        assert "phase=training" not in field.log
        listed = fleet.operate("release", "list").stdout
        assert "decided on 1 device" in listed
        assert field.program.stop() == 0


def by_hand(workshop, slices: bytes, device: Device, text: str, folder: Path):
    """The answer of a worker on the publisher's own package and the values that fetch-slices wrote."""
    values = folder / "values.safetensors"
    values.write_bytes(slices)
    package = workshop.package()
    prepared = device.folder / "state" / "prepared"
    sha256 = Package.open(package.folder, package.publisher_key).sha256
    model = model_of_folder(
        package.folder, values, package.publisher_key, 1 << 30, 1, "onnxruntime", prepared / sha256
    )
    with InferenceSession.start(model.job()) as session:
        return session.classify(text)
