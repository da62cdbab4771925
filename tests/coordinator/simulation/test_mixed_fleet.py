"""A fleet of which some devices can run adjoint programs, in a run that leaves the estimator to each."""

from __future__ import annotations

import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.simulation.config import read_simulation_config
from coordinator.simulation.record import Record
from coordinator.simulation.report.progress import Lines
from coordinator.simulation.sweep import Options, make_plan, sweep
from tests.coordinator.simulation.conftest import toml
from tests.export import tiny


def simulate(folder: Path, package: Path, adjoints: float, **run: object) -> Record:
    """One round of six devices of four rows on a real package."""
    rows = [
        json.dumps({"text": text, "label": tiny.LABELS[number % 3]})
        for number, text in enumerate(tiny.SENTENCES * 3)
    ]
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    table = {
        "name": "mixed",
        "seeds": [0],
        "fleet": {"devices": 6, "cap": "512M", "arithmetic": "row_int8", "adjoints": adjoints},
        "data": {"train": "train.jsonl", "dev": "dev.jsonl", "partition": "iid", "rows_per_device": 4},
        "run": {
            "rounds": 1, "devices_per_round": 6, "steps": 2, "batch_size": 4, "deadline_s": 60.0, "draws": 4, **run
        },
        "arms": [{"name": "arm", "package": str(package)}],
    }  # fmt: skip
    (folder / "sim.toml").write_text(toml(table))
    config = read_simulation_config(folder / "sim.toml")
    (record,) = sweep(make_plan(config, Options(folder / "out", threads=1)), Lines(io.StringIO()))
    assert record.status == "finished", record.reason
    return record


def stated(folder: Path) -> list[tuple[str, int]]:
    """What each counted result of the only arm tells of its estimator."""
    (database,) = (folder / "out" / "state").glob("*/coordinator.db")
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT estimator, draws FROM results ORDER BY 1, 2").fetchall()


@pytest.mark.parametrize(("adjoints", "exact"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_devices_take_what_they_can_have(exported, tmp_path, adjoints: float, exact: int) -> None:
    """Of six devices the share that the configuration names is exact, the others take all draws; passes follow."""
    record = simulate(tmp_path, exported.package.folder, adjoints, update="best", directions="shared")
    assert stated(tmp_path) == [*[("backprop", 0)] * exact, *[("forward", 4)] * (6 - exact)]
    # 2 steps of 4 rows a device; backpropagation counts four passes, 4 draws five.
    assert record.points[-1].forward_passes == 2 * 4 * (4 * exact + 5 * (6 - exact))


def test_a_fleet_that_can_all_be_exact_learns_what_backpropagation_does(exported, tmp_path) -> None:
    """With adjoint programs everywhere the values are those of ``update = "backprop"``, to the last bit."""
    values = []
    for name, run in (("best", {}), ("backprop", {"draws": 1})):
        (tmp_path / name).mkdir()
        values.append(
            simulate(tmp_path / name, exported.package.folder, 1.0, update=name, **run).values_sha256
        )
    assert values[0] == values[1]
