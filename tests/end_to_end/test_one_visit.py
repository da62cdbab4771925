"""One visit to each device, every part a real process: from an ordinary run.toml to an adapter that predicts alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.package.block_head import head_of
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import decode_values
from tests.end_to_end.harness import Fleet, command
from tests.end_to_end.test_adapter import read_batch
from tests.end_to_end.workshop import LABELS, rows, write_rows
from tests.export import classifiers
from tests.export.classifiers import Alone


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_fleet_learns_in_one_visit(workshop, tmp_path: Path) -> None:
    """Three devices, each with other labels, are asked once; the head knows all of them, on the runtime and alone.

    A second run goes on from the sums: one device has more rows then, one fewer, and of the third nothing travels.
    """
    exported = workshop.package("lora_xs", "none")
    dev = write_rows(tmp_path / "dev.jsonl", rows()[160:260])
    slices, adapter, model = tmp_path / "slices", tmp_path / "adapter", workshop.folder / "model"
    with Fleet(tmp_path / "fleet", exported) as fleet:
        path = fleet.write_run(evaluation={"data": dev}, min_results=2)
        done = fleet.operate("run", "create", path, "--one-visit")
        assert done.returncode == 0, done.stderr
        for number, name in enumerate(("ash", "birch", "cedar")):
            # Each device lacks one label and has most rows of another.
            own = [row for row in rows()[:150] if row["label"] != LABELS[number]][number::2]
            fleet.add_device(name, own, arithmetic="float")
        run = fleet.wait_until_finished()
        assert fleet.operate("run", "fetch-slices", "--output", slices).returncode == 0
        left = change_rows(fleet)
        done = fleet.operate("run", "create", path, "--one-visit", "--continue-from", run.run_id)
        assert done.returncode == 0, done.stderr
        later = fleet.wait_until_finished()
        told = [event.message for event in fleet.admin.events() if event.code == "head_solved"]
    assert f"of {left} rows" in told[-1]
    assert sum(entry.examples for entry in later.rounds) == 4 + left_of_cedar(fleet)
    assert any("took off" in message for message in told)
    assert any("had nothing new" in message for message in told)
    assert run.reason == later.reason == "every device was asked once"
    assert run.rounds_committed == run.rounds_wanted == 2
    assert sorted(name for entry in run.rounds for name in entry.devices) == ["ash", "birch", "cedar"]
    accuracies = [entry.accuracy for entry in run.rounds]
    assert accuracies[-1] > max(0.5, run.initial_accuracy + 0.2)
    assert all(entry.measured_peak_bytes > 1 << 20 for entry in run.rounds)

    done = command(
        *("export.cli", "adapter", exported.folder, "--slices", slices, "--output", adapter),
        *("--publisher-key", exported.publisher_key, "--base-model", model),
    )
    assert done.returncode == 0, done.stderr
    data = slices.read_bytes()
    assert head_of(data)[0] == (0, 1, 2)
    prepared = PreparedPackage.as_stored(Package.open(exported.folder, exported.publisher_key))
    seen = prepared.with_head(*head_of(data))
    batch = read_batch(prepared.package, write_rows(tmp_path / "texts.jsonl", rows()[260:284]))
    ours = Executor(seen, OnnxEngine()).sweep(decode_values(data, seen.manifest.slices), [batch]).logits
    (theirs,) = classifiers.predict_alone([Alone("loader", adapter, batch, LABELS, model)])
    order = [seen.manifest.labels.index(label) for label in LABELS]
    np.testing.assert_allclose(theirs, ours[:, order], atol=2e-3)


def change_rows(fleet: Fleet) -> int:
    """Give ash four more rows and take three of cedar's; the number of rows that all have then."""
    files = {name: device.folder / "data.jsonl" for name, device in fleet.devices.items()}
    with files["ash"].open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows()[150:154])
    lines = files["cedar"].read_text().splitlines(keepends=True)
    files["cedar"].write_text("".join(lines[3:]))
    return sum(len(path.read_text().splitlines()) for path in files.values())


def left_of_cedar(fleet: Fleet) -> int:
    """Number of rows that cedar has in the end."""
    return len((fleet.devices["cedar"].folder / "data.jsonl").read_text().splitlines())
