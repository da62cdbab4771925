"""What the dashboard asks of several tables."""

from __future__ import annotations

from coordinator.storage import fleet_rows
from tests.coordinator.conftest import World


def fingerprint(world: World) -> str:
    """What tells that something has happened."""
    with world.stores.storage.reading() as connection:
        return fleet_rows.fingerprint(connection)


def test_whatever_a_page_shows_changes_the_fingerprint(world: World) -> None:
    """A run, a round, a task, a result, a pause each change it; check-ins without work do not."""
    (device, other) = world.fleet("a", "b")
    seen = [fingerprint(world)]
    device.check_in()
    assert fingerprint(world) == seen[0]
    run_id = world.create_run()
    seen.append(fingerprint(world))
    world.play()
    seen.append(fingerprint(world))
    task = device.task()
    assert task is not None
    other.task()
    seen.append(fingerprint(world))
    device.deliver(device.result(task))
    seen.append(fingerprint(world))
    world.admin("POST", f"/v1/admin/runs/{run_id}/pause")
    seen.append(fingerprint(world))
    assert len(set(seen)) == len(seen)


def test_losses_are_weighted_and_those_that_count(world: World) -> None:
    """A round's loss is the mean over examples; rounds that were taken back have none."""
    devices = world.fleet("a", "b")
    run_id = world.create_run(rounds=3)
    for number in range(2):
        world.play()
        for device, loss in zip(devices, (1.0, 2.0), strict=True):
            task = device.task()
            assert task is not None
            device.deliver(device.result(task, mean_loss=loss + number, examples=10 if loss == 1 else 5))
        world.play()
    with world.stores.storage.reading() as connection:
        assert fleet_rows.train_losses(connection, run_id) == [(0, 20 / 15), (1, 35 / 15)]
    world.admin("POST", f"/v1/admin/runs/{run_id}/rollback", {"to": 0})
    with world.stores.storage.reading() as connection:
        assert fleet_rows.train_losses(connection, run_id) == [(0, 20 / 15)]


def test_troubles_are_counted_by_code(world: World) -> None:
    """Events are counted by code, with their devices and the newest message; other codes are left out."""
    with world.stores.storage.transaction() as connection:
        connection.executemany(
            "INSERT INTO events (at_s, run_id, device, code, message) VALUES (0, ?, ?, ?, ?)",
            [
                ("r", "a", "task_failed", "1"),
                ("r", "b", "task_failed", "2"),
                ("q", "b", "task_failed", "3"),
                ("r", "a", "enrolled", "4"),
                ("r", "a", "device_late", "5"),
            ],
        )
        codes = ("task_failed", "device_late")
        found = [
            (each.code, each.count, each.devices, each.message)
            for each in fleet_rows.troubles(connection, codes)
        ]
        assert found == [("task_failed", 3, 2, "3"), ("device_late", 1, 1, "5")]
        of_run = fleet_rows.troubles(connection, codes, run_id="q")
        assert [(each.code, each.count) for each in of_run] == [("task_failed", 1)]
