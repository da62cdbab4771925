"""Figures over the whole database agree with what is told of each device."""

from __future__ import annotations

import pytest

from edge_runtime.protocol.messages import CheckInRequest, encode
from tests.coordinator.conftest import FakeDevice, World
from tests.coordinator.monitoring.scrape import scrape


@pytest.mark.parametrize("state", ["revoked", "never seen", "silent", "not eligible", "ready"])
def test_every_state_of_a_device_is_told(world: World, state: str) -> None:
    """What the metrics say of a device is what ``device list`` says of it."""
    device = FakeDevice(world, "ash")
    device.enrol()
    if state != "never seen":
        device.check_in()
    if state == "revoked":
        world.admin("POST", "/v1/admin/devices/ash/revoke")
    if state == "silent":
        world.clock.now_s += 1e6
    if state == "not eligible":
        request = CheckInRequest("test", 1 << 30, 1 << 20, 10, not_eligible="on_battery")
        assert device.send("POST", "/v1/check-in", encode(request)).status_code == 200
    (listed,) = world.admin("GET", "/v1/admin/devices").json()
    assert listed["state"] == state
    devices = {
        dict(labels)["state"]: value
        for (name, labels), value in scrape(world).items()
        if name == "edge_devices"
    }
    assert devices == {state: 1}
