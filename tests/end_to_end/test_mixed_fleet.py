"""A fleet with a device on each engine ends where one engine does; a package without its programs is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.package.package import Package
from edge_runtime.package.slices import decode_values
from tests.end_to_end.conftest import device_rows
from tests.end_to_end.harness import Fleet
from tests.end_to_end.workshop import Exported

#: Two rounds of two devices, both of which must report. In the first, the head is zero and no slice has a gradient.
ROUNDS = {"rounds": 2, "devices_per_round": 2, "min_devices": 2, "min_results": 2}
ENGINES = {"ash": "onnxruntime", "birch": "executorch"}
#: Between the changes of slices that two engines reach in float arithmetic.
TOLERANCE = 1e-3


def finish_rounds(folder: Path, package: Exported, engines: dict[str, str]) -> tuple[bytes, Fleet]:
    """Two rounds by devices on these engines; the final slices, and the fleet as it ended."""
    with Fleet(folder, package) as fleet:
        fleet.create_run(**ROUNDS)
        for name, engine in engines.items():
            fleet.add_device(name, device_rows(name), arithmetic="float", engine=engine)
        fleet.wait_until_finished()
        return fleet.admin.slices(), fleet


def downloaded_programs(fleet: Fleet, device: str) -> set[str]:
    """Kinds of program files in a device's package folder."""
    return {path.suffix for path in (fleet.devices[device].folder / "state/packages").rglob("programs/*")}


def test_a_mixed_fleet_ends_where_one_engine_does(workshop, tmp_path) -> None:
    """Two rounds with a device on each engine change every slice as two ONNX devices do, within 1e-3.

    Each device has downloaded the programs of its own engine alone.
    """
    exported = workshop.package_for_both_engines()
    mixed, fleet = finish_rounds(tmp_path / "mixed", exported, ENGINES)
    assert downloaded_programs(fleet, "ash") == {".onnx"}
    assert ".pte" in downloaded_programs(fleet, "birch")
    alike, _ = finish_rounds(tmp_path / "alike", exported, dict.fromkeys(ENGINES, "onnxruntime"))

    manifest = Package.open(exported.folder, exported.publisher_key).manifest
    initial = decode_values((exported.folder / manifest.initial_state).read_bytes(), manifest.slices)
    one, other = (decode_values(data, manifest.slices) for data in (mixed, alike))
    for name, before in initial.items():
        expected, got = other[name] - before, one[name] - before
        assert np.abs(expected).max() > 0, name
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max(), name
    assert mixed != alike  # two engines did run


def test_a_package_without_the_engines_programs_is_refused(workshop, tmp_path) -> None:
    """A device on ExecuTorch turns a package for ONNX Runtime down, and the operator reads why."""
    with Fleet(tmp_path / "fleet", workshop.package()) as fleet:
        fleet.create_run(**{**ROUNDS, "devices_per_round": 1, "min_devices": 1, "min_results": 1})
        fleet.add_device("birch", device_rows("birch"), arithmetic="float", engine="executorch")
        (event, *_) = fleet.wait("the refusal", lambda: fleet.events("birch", "task_failed"))
        assert "has no programs for executorch, only for onnxruntime" in event.message
