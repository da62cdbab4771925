"""Simulated fleets of which a share grants half the cap, and the tasks that they were given."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import msgspec

from coordinator.simulation.record import Record
from edge_runtime.protocol.messages import Task
from tests.coordinator.simulation.conftest import Workshop


def simulate_mixed(
    workshop: Workshop, package: str, output: str, half: float, run: Mapping[str, object]
) -> Record:
    """Six devices, of which the share ``half`` grants half the cap."""
    (record,) = workshop.simulate(
        output,
        run=run,
        fleet={"devices": 6, "half_cap": half},
        arms=[{"name": "arm", "package": package}],
    )
    assert record.status == "finished", record.reason
    return record


def handed_out(folder: Path) -> list[Task]:
    """Each counted task of the one arm of a simulation."""
    (state,) = (folder / "state").iterdir()
    with closing(sqlite3.connect(state / "coordinator.db")) as connection:
        found = connection.execute("SELECT task FROM tasks WHERE state = 'counted'").fetchall()
    return [msgspec.json.decode(text, type=Task) for (text,) in found]
