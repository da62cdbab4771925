"""The fleet by class and state, its memory, and one device."""

from __future__ import annotations

from coordinator.dashboard import fleet
from coordinator.dashboard.fleet import MOST_CLASSES, OTHERS, STATES
from coordinator.rounds.summary import devices_of
from edge_runtime.protocol.messages import MemoryReport
from tests.coordinator.conftest import World


def test_devices_are_counted_as_they_are_listed(world: World) -> None:
    """The table's counts are those of the list of devices; classes beyond its end are counted together."""
    world.fleet("a", "b")
    world.create_run()
    world.play()
    with world.stores.storage.transaction() as connection:
        connection.executemany(
            "INSERT INTO devices (device_id, name, class, public_key, enrolled_s) VALUES (?, ?, ?, '', 0)",
            [(f"d{n}", f"x{n}", f"class-{n % 20:02}") for n in range(20)],
        )
        counted = fleet.count_classes(world.stores, connection, now_s=world.clock.now_s)
        listed = devices_of(world.stores, connection, now_s=world.clock.now_s)
    assert [row.name for row in counted[-1:]] == [OTHERS]
    assert len(counted) == MOST_CLASSES + 1
    for index, state in enumerate(STATES):
        assert sum(row.states[index] for row in counted) == sum(device.state == state for device in listed)
    assert {device.state for device in listed} <= set(STATES)
    generic = next(row for row in counted if row.name == "generic")
    assert dict(zip(STATES, generic.states, strict=True))["asked"] == 2


def test_memory_is_compared_by_class(world: World) -> None:
    """Of a class the largest peaks, the smallest cap, and the largest excess over a prediction are told."""
    devices = world.fleet("a", "b")
    world.create_run()
    world.play()
    for device, memory in zip(
        devices, (MemoryReport(100, 90, 500), MemoryReport(200, 150, 400, cgroup_peak_bytes=220)), strict=True
    ):
        task = device.task()
        assert task is not None
        device.deliver(device.result(task, memory=memory))
    with world.stores.storage.reading() as connection:
        (row,) = fleet.memory_by_class(connection)
    assert (row.name, row.results, row.cap_bytes) == ("generic", 2, 400)
    assert (row.predicted_bytes, row.measured_bytes) == (
        max(100, 200),
        max(fleet.measured_bytes(MemoryReport(100, 90, 500)), 220),
    )


def test_a_device_that_is_set_aside_says_by_whom(world: World) -> None:
    """A device's page names the runs that ask it no more, with the reason, and what it holds."""
    device, _ = world.fleet("a", "b")
    run_id = world.create_run()
    world.play()
    assert device.task() is not None
    with world.stores.storage.transaction() as connection:
        connection.execute(
            "INSERT INTO set_aside VALUES (?, ?, 0, 'the disk is full', '')", (run_id, device.device_id)
        )
        shown = fleet.device_page(world.stores, connection, "a", now_s=world.clock.now_s)
    assert shown["aside"] == [(run_id, "the disk is full")]
    assert shown["held"]["run_id"] == run_id
    assert shown["report"] is None
