"""Real agents and a real daemon in masked rounds, one of them cut by a kill: the sum is that of the plain integers."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.config import run_config
from coordinator.rounds.deltas import of_vector
from edge_runtime.package.manifest import parse_manifest
from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol.messages import Task
from edge_runtime.training.protected import protect
from tests.coordinator.formula import delta_of, examples_of
from tests.end_to_end.harness import wait_for
from tests.faults.small_fleet import SETTINGS, SPECS, SmallFleet, small_fleet, wait_for_end


def stage_of(fleet: SmallFleet) -> str:
    """What the open round waits for, as the database has it."""
    with sqlite3.connect(f"file:{fleet.state}/coordinator.db?mode=ro", uri=True, timeout=10.0) as connection:
        row = connection.execute("SELECT stage FROM masked_rounds").fetchone()
    return "" if row is None else str(row[0])


@pytest.mark.parametrize("killed", [False, True])
def test_masked_rounds_over_http_give_the_plain_sum(tmp_path: Path, killed: bool) -> None:
    """Three agents' masked results add up to the plain integers, also if the daemon is killed as it waits for them."""
    with small_fleet(tmp_path / "fleet") as fleet:
        package = fleet.folder / "package"
        publisher_key = (fleet.folder / "publisher").read_text()
        table = {
            **SETTINGS,
            "devices_per_round": 3,
            "min_results": 3,
            "rounds": 1,
            "secure_aggregation": True,
        }
        table |= {"package": str(package), "publisher_key": publisher_key, "seed": 5}
        run_id = fleet.admin.create_run(run_config(table))
        wait_for("a masked stage", lambda: stage_of(fleet) != "")
        if killed:
            fleet.kill_coordinator()
        run = wait_for_end(fleet, run_id)
        assert [entry.results for entry in run.counting] == [3]
        log = (fleet.folder / "log").read_text()
        assert "masking_answered" in log
        # The same in this process, of the formula's changes as integers.
        manifest = parse_manifest((package / "manifest.json").read_bytes())
        with sqlite3.connect(fleet.state / "coordinator.db") as connection:
            rows = connection.execute(
                "SELECT name, task FROM tasks JOIN devices USING (device_id) WHERE tasks.state = 'counted'"
                " ORDER BY round, slot"
            ).fetchall()
        first = msgspec.json.decode(rows[0][1], type=Task)
        (path,) = (fleet.state / "blobs").rglob(f"*{first.state[2:]}")
        values = decode_values(path.read_bytes(), SPECS)
        total = 0
        for name, text in rows:
            task = msgspec.json.decode(text, type=Task)
            change = encode_values(delta_of(manifest.slices, task, name))
            data = protect(task, manifest, change, examples_of(task), bytes(32))
            total = total + np.frombuffer(data, "<i4").astype(np.int64)
        assert isinstance(total, np.ndarray)
        assert task.protection is not None
        mean = total[:-1] * task.protection.quantum / (total[-1] / task.protection.largest)
        delta = of_vector(manifest, task, values, mean)
        values = {name: values[name] + delta.get(name, 0) for name in values}
        assert fleet.admin.slices(run_id) == encode_values(values)
