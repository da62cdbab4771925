"""A whole run: coordinator, three devices, three rounds, every part a real process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edge_runtime import __version__
from edge_runtime.figures import size
from edge_runtime.package.package import Package
from edge_runtime.package.slices import decode_values
from tests.edge_runtime.html.pages import assert_stands_alone, assert_well_formed, text_of
from tests.end_to_end.conftest import SECRETS, device_rows
from tests.end_to_end.workshop import LABELS


def test_every_round_has_all_its_figures(undisturbed) -> None:
    """A finished run has accuracy, loss, traffic, time and both memory peaks for each of its rounds."""
    assert [entry.state for entry in undisturbed.run.rounds] == ["committed"] * 3
    for entry in undisturbed.run.rounds:
        assert 0 <= entry.accuracy <= 1
        assert entry.loss > 0
        assert entry.train_loss > 0
        assert entry.bytes_up > 1000
        assert entry.bytes_down > 1000
        assert 0 < entry.seconds < 600
        assert entry.predicted_peak_bytes > 1 << 20
        assert entry.measured_peak_bytes > 1 << 20
        assert entry.results == len(entry.devices) == 2
        assert entry.examples == 2 * 4 * 8
    watched = undisturbed.watched.splitlines()
    assert watched[-1].startswith(f"{undisturbed.run.run_id}: finished")


def test_the_run_learns(undisturbed) -> None:
    """The global model's loss on rows that no device has falls below that of the values it started from."""
    assert undisturbed.run.initial_loss is not None
    assert undisturbed.run.rounds[-1].loss < undisturbed.run.initial_loss


def test_every_slice_has_moved(undisturbed, workshop) -> None:
    """The fetched values fit the package, and each of its slices differs from the initial one."""
    package = Package.open(workshop.package().folder, workshop.publisher_key)
    initial = package.path(package.manifest.initial_state).read_bytes()
    before = decode_values(initial, package.manifest.slices)
    after = decode_values(undisturbed.slices, package.manifest.slices)
    assert len(after) == 2 * 2 + 2
    assert [name for name in after if np.array_equal(after[name], before[name])] == []


def test_the_report_is_written(undisturbed) -> None:
    """``run report`` leaves the run as a page with versions and cap, as JSON, as a table and as a curve."""
    folder = undisturbed.folder / "report"
    assert len(json.loads((folder / "report.json").read_bytes())["run"]["rounds"]) == 3
    assert undisturbed.run.run_id in (folder / "report.txt").read_text()
    assert "<svg" in (folder / "curve.svg").read_text()
    page = (folder / "report.html").read_text()
    assert_stands_alone(page)
    assert_well_formed(page)
    text = text_of(page)
    assert "✓ Finished" in text
    assert f"edge-runtime {__version__}" in text
    assert f"The cap is {size(undisturbed.run.rounds[0].caps_bytes[0])}" in text
    assert all(name in text for entry in undisturbed.run.rounds for name in entry.devices)


def test_everybody_stops_when_told(undisturbed) -> None:
    """SIGTERM ends agents and coordinator with exit code 0."""
    assert undisturbed.exit_codes == {**dict.fromkeys(SECRETS, 0), "coordinator": 0}
    assert "Application shutdown complete" in (undisturbed.folder / "coordinator.log").read_text()


def test_same_seed_same_bytes(undisturbed, start_fleet) -> None:
    """A repetition with fresh folders, keys and ids ends with the same slices, bit for bit."""
    fleet = start_fleet()
    fleet.wait_until_finished()
    assert fleet.admin.slices() == undisturbed.slices


def test_another_seed_other_bytes(undisturbed, start_fleet) -> None:
    """The seed is what the final slices depend on."""
    fleet = start_fleet(seed=6)
    fleet.wait_until_finished()
    assert fleet.admin.slices() != undisturbed.slices


def test_no_text_or_label_leaves_a_device(undisturbed) -> None:
    """Neither the devices' traffic, nor the coordinator's folder, nor any log holds a row of a device.

    The label set is part of the package, so label names may travel to a device; none may come from one.
    """
    texts = [row["text"].encode() for name in SECRETS for row in device_rows(name)]
    texts += [json.dumps(text.decode())[1:-1].encode() for text in texts]
    private = [*texts, *(secret.encode() for secret in SECRETS.values())]
    labels = [label.encode() for label in LABELS]
    state = undisturbed.folder / "coordinator"
    logs = contents(path for path in undisturbed.folder.rglob("*.log") if path.name != "audit.log")
    database = contents(state.glob("coordinator.db*"))
    stored = contents(path for path in state.rglob("*") if path.is_file())
    assert len(undisturbed.up) > 10_000
    assert b"phase=training" in logs
    assert undisturbed.run.run_id.encode() in database
    for place in (undisturbed.up, undisturbed.down, logs, stored):
        assert [word for word in private if word in place] == []
    for place in (undisturbed.up, logs, database):
        assert [label for label in labels if label in place] == []


def contents(paths: Iterable[Path]) -> bytes:
    """The bytes of all these files."""
    return b"\n".join(path.read_bytes() for path in paths)


def test_every_device_reads_only_its_own_rows(undisturbed) -> None:
    """Of all devices' folders, the processes of a device open files of its own only."""
    for name in SECRETS:
        folder = undisturbed.folder / "devices" / name
        opened = set((folder / "audit.log").read_text().splitlines())
        assert str(folder / "data.jsonl") in opened
        elsewhere = {path for path in opened if path.startswith(str(undisturbed.folder))}
        assert {path for path in elsewhere if not path.startswith(f"{folder}/")} == set()
