"""What only grew: results of abandoned rounds, orphans, events, and the write-ahead log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coordinator.events import record
from coordinator.rounds import retention
from coordinator.rounds.retention import GRACE_S, clear_out
from coordinator.storage.database import MAX_WAL_BYTES
from tests.coordinator.conftest import World


def private_files(world: World) -> list[Path]:
    """Files of results and of servers' states."""
    return [path for path in (world.folder / "state/private").rglob("*") if path.is_file()]


def test_results_of_closed_rounds_go(world: World) -> None:
    """What a stopped round or a killed process left goes after a grace; what is open stays."""
    devices = world.fleet("a", "b")
    world.create_run(min_results=2, rounds=3)
    world.work(devices)  # committed: the server's state stays
    world.play()
    tasks = [device.task() for device in devices]
    devices[0].deliver(devices[0].result(tasks[0]))  # type: ignore[arg-type]
    (world.folder / "state/private/ab").mkdir(exist_ok=True)
    (world.folder / "state/private/ab/.half.tmp").write_bytes(b"half")
    assert len(private_files(world)) == 3
    later_s = time.time() + GRACE_S + 10
    clear_out(world.stores, time.time())
    assert len(private_files(world)) == 3
    clear_out(world.stores, later_s)
    assert len(private_files(world)) == 2
    world.admin("POST", "/v1/admin/runs/latest/stop")
    clear_out(world.stores, later_s)
    assert len(private_files(world)) == 1
    assert world.values()


def test_events_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many events the oldest go."""
    monkeypatch.setattr(retention, "EVENTS_KEPT", 10)
    with world.stores.storage.transaction() as connection:
        for number in range(25):
            record(connection, 0.0, f"e{number}", "")
    clear_out(world.stores, time.time())
    with world.stores.storage.reading() as connection:
        codes = [row[0] for row in connection.execute("SELECT code FROM events ORDER BY event_id")]
    assert codes == [f"e{number}" for number in range(15, 25)]


def test_the_write_ahead_log_is_bounded(world: World) -> None:
    """After a large transaction the log is cut, so it never takes more disk than it needs for long."""
    with world.stores.storage.transaction() as connection:
        for _ in range(12_000):
            record(connection, 0.0, "e", "x" * 2000)
    for _ in range(3):
        with world.stores.storage.transaction() as connection:
            record(connection, 0.0, "e", "")
    assert (world.folder / "state/coordinator.db-wal").stat().st_size <= MAX_WAL_BYTES
