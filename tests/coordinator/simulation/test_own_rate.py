"""A rate that sets itself, in a simulated fleet on a real package."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from coordinator.aggregation.own_rate import START
from coordinator.aggregation.server_state import ServerState
from tests.coordinator.simulation.test_mixed_fleet import simulate


def test_devices_measure_along_the_last_step(exported, tmp_path: Path) -> None:
    """From the second round on a draw more is taken, and what it measures is in the server's state and the rate."""
    record = simulate(
        tmp_path,
        exported.package.folder,
        1.0,
        rounds=3,
        split="whole",
        directions="shared",
        server_optimizer={"slices": {"name": "adam", "rate": "auto"}, "head": {"name": "adam", "rate": 0.01}},
    )
    # 2 steps of 4 rows by 6 devices, of one pass for the values and one for each of 4 draws.
    assert record.points[-1].forward_passes == 2 * 4 * 6 * (5 + 6 + 6)
    (folder,) = (tmp_path / "out" / "state").iterdir()
    with closing(sqlite3.connect(folder / "coordinator.db")) as connection:
        ((sha256,),) = connection.execute("SELECT optimizer_sha256 FROM runs")
    own = ServerState.decode((folder / "private" / sha256[:2] / sha256).read_bytes()).own
    assert own.bend > 0
    assert own.rate != START
