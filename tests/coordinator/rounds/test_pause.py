"""A paused run: what devices work on is taken, nothing new is begun, and resuming goes on where it stood."""

from __future__ import annotations

import pytest

from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import ComeBack, Refusal
from tests.coordinator.conftest import World


def test_a_paused_run_takes_what_comes_and_begins_nothing(world: World) -> None:
    """Results of the open round commit it; no other round opens until the run is resumed; the bits are the same."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=2)
    world.play()
    tasks = [device.task() for device in devices]
    for changed in (True, False):
        answer = world.admin("POST", "/v1/admin/runs/latest/pause").json()
        assert (answer["paused"], answer["changed"]) == (True, changed)
    for device, task in zip(devices, tasks, strict=True):
        assert task is not None
        assert device.deliver(device.result(task)).json() == {"status": "counted"}
    world.play(3)
    assert [row["state"] for row in world.run()["rounds"]] == ["committed"]
    assert world.run()["paused"]
    answer = devices[0].check_in()
    assert isinstance(answer, ComeBack)
    assert answer.reason == "run paused"
    world.start()  # a restart keeps it
    world.play(2)
    assert len(world.run()["rounds"]) == 1
    assert world.admin("POST", "/v1/admin/runs/latest/resume").json()["changed"]
    world.work(devices)
    assert (world.run()["state"], world.run()["paused"]) == ("finished", False)


def test_a_place_that_falls_vacant_waits(world: World) -> None:
    """While a run is paused, a place whose device fell out is offered to nobody."""
    world.fleet("a", "b", "c")
    world.create_run(devices_per_round=1, min_devices=3, selection_timeout_s=30.0)
    world.play()
    world.admin("POST", "/v1/admin/runs/latest/pause")
    holder = next(device for device in world.devices.values() if device.task() is not None)
    refused = messages.DeviceEvent("task_refused", "no", holder.task().task_id)  # type: ignore[union-attr]
    holder.send("POST", "/v1/events", messages.encode(refused))
    world.play(2)
    assert all(device.task() is None for device in world.devices.values())


@pytest.mark.parametrize("word", ["pause", "resume"])
def test_what_has_ended_cannot_be_paused(world: World, word: str) -> None:
    """A queued run may be paused and then begins nothing; one that was stopped may not, and is told so."""
    world.fleet("a", "b")
    world.create_run()
    assert world.admin("POST", "/v1/admin/runs/latest/pause").status_code == 200
    world.play(2)
    assert world.run()["rounds"] == []
    world.admin("POST", "/v1/admin/runs/latest/stop")
    answer = world.admin("POST", f"/v1/admin/runs/latest/{word}")
    assert (answer.status_code, messages.decode(answer.content, Refusal).code) == (409, "run_ended")
