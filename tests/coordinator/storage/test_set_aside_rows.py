"""Rows of devices that were set aside."""

from __future__ import annotations

from coordinator.storage import set_aside_rows
from tests.coordinator.conftest import World


def test_the_first_reason_stays_and_can_be_removed(world: World) -> None:
    """A device is set aside once for each run, by name in the list, until it is removed."""
    (device,) = world.fleet("a")
    run_id = world.create_run()
    with world.stores.storage.transaction() as connection:
        for reason in ("first", "second"):
            set_aside_rows.add(connection, run_id, device.device_id, at_s=1.0, reason=reason, setup="s")
        found = set_aside_rows.find(connection, run_id, device.device_id)
        assert set_aside_rows.of_run(connection, run_id) == [found]
        assert found == set_aside_rows.SetAsideRow("a", 1.0, "first", "s")
        assert set_aside_rows.find(connection, "another", device.device_id) is None
        assert set_aside_rows.remove(connection, run_id, device.device_id)
        assert not set_aside_rows.remove(connection, run_id, device.device_id)
        assert set_aside_rows.of_run(connection, run_id) == []
