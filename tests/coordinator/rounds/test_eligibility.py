"""Devices that say that they may not work: they get no place, keep none, and are counted by their reason."""

from __future__ import annotations

from coordinator.admin.report import not_eligible_lines
from coordinator.rounds.summary import RunSummary
from edge_runtime.protocol.messages import ComeBack, SignedTask, decode
from tests.coordinator.conftest import World
from tests.coordinator.rounds.test_releases import check_in
from tests.coordinator.rounds.test_visits import events


def test_a_device_that_may_not_work_gets_no_place(world: World) -> None:
    """It is told to come back, no round waits for it, and one that may again is asked like every other."""
    hot, *others = world.fleet("hot", "b", "c")
    answer = check_in(hot, not_eligible="too_hot")
    assert isinstance(answer, ComeBack)
    assert answer.reason == "not eligible: too_hot"
    world.create_run(min_devices=3)
    world.play()
    assert world.run()["rounds"] == []
    assert isinstance(check_in(hot), ComeBack)
    world.play()
    assert world.run()["rounds"] != []
    assert {type(check_in(device)) for device in (hot, *others)} == {ComeBack, SignedTask}


def test_a_place_goes_to_another(world: World) -> None:
    """Whether it was asked or already works: a device that may no longer work loses its place, which is filled."""
    devices = world.fleet("a", "b", "c")
    world.create_run()
    world.play()
    held = [device for device in devices if isinstance(check_in(device), SignedTask)]
    assert len(held) == 2
    assert isinstance(check_in(held[0], not_eligible="on_battery"), ComeBack)
    world.play()
    (other,) = [device for device in devices if device not in held]
    assert isinstance(check_in(other), SignedTask)
    assert world.run()["rounds"][0]["refused"] == 1
    assert "on_battery; its place goes to another device" in events(world, "not_eligible")


def test_they_are_counted_by_reason(world: World) -> None:
    """Operators see how many and why: in the run, in the list of devices, and as an event when a reason is new."""
    a, b, c, d = world.fleet("a", "b", "c", "d")
    world.create_run(min_devices=3)
    for device, reason in ((a, "too_hot"), (b, "too_hot"), (c, "few_rows"), (c, "few_rows"), (d, "")):
        check_in(device, not_eligible=reason)
    run = decode(world.admin("GET", "/v1/admin/runs/latest").content, RunSummary)
    assert run.not_eligible == {"few_rows": 1, "too_hot": 2}
    assert not_eligible_lines(run) == ["not eligible now: 1 few_rows, 2 too_hot"]
    listed = {device["name"]: device for device in world.admin("GET", "/v1/admin/devices").json()}
    assert (listed["a"]["state"], listed["a"]["reason"]) == ("not eligible", "too_hot")
    assert listed["d"]["state"] == "ready"
    assert sorted(events(world, "not_eligible")) == ["few_rows", "too_hot", "too_hot"]


def test_a_release_is_told_all_the_same(world: World) -> None:
    """A device with few rows trains nothing, and still learns of what others have learned."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=1)
    world.work(devices)
    world.admin("POST", "/v1/admin/releases", {})
    answer = check_in(devices[0], not_eligible="few_rows")
    assert isinstance(answer, ComeBack)
    assert answer.release is not None
