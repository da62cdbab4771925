"""A device that dies in mid-task frees its place long before its deadline; one that says it works keeps it."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.rounds import state_machine
from coordinator.rounds.tasks import MISSED_SIGNS
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import Refusal, Standing
from tests.coordinator.conftest import FakeDevice, World

EVERY_S = 20.0
PLENTY_S = 5000.0


def say(device: FakeDevice, task_id: str) -> Standing:
    """A sign of life, and how the task stands."""
    answer = device.send("POST", f"/v1/tasks/{task_id}/alive")
    assert answer.status_code == 200, answer.text
    return messages.decode(answer.content, Standing)


@pytest.fixture
def working(world: World) -> tuple[FakeDevice, FakeDevice, Any]:
    """A device that works on the only place of a round, another one that waits, and the task."""
    devices = world.fleet("a", "b")
    world.create_run(
        devices_per_round=1, min_devices=2, rounds=1, alive_every_s=EVERY_S, deadline_s=PLENTY_S,
        selection_timeout_s=PLENTY_S,
    )  # fmt: skip
    world.play()
    first = next(device for device in devices if device.task() is not None)
    second = next(device for device in devices if device is not first)
    return first, second, first.task()


def codes(world: World) -> list[str]:
    """Codes of the run's events."""
    return [event["code"] for event in world.admin("GET", "/v1/admin/runs/latest/events").json()]


def test_a_dead_device_frees_its_place(world: World, working: tuple[FakeDevice, FakeDevice, Any]) -> None:
    """After three missing signs the place goes to another device; the first is told, if it lives."""
    first, second, task = working
    for _ in range(5):
        assert say(first, task.task_id) == Standing(EVERY_S)
        world.clock.now_s += EVERY_S
        second.check_in()
        world.play()
    world.clock.now_s += (MISSED_SIGNS - 1) * EVERY_S - 1
    world.play()
    assert "device_lost" not in codes(world)
    world.clock.now_s += 2
    second.check_in()
    world.play()
    assert codes(world)[-1] == "device_lost"
    other = second.task()
    assert other is not None
    assert other.slot == task.slot
    assert say(first, task.task_id) == Standing(EVERY_S, wanted=False)
    assert second.deliver(second.result(other)).status_code == 200
    world.play()
    assert (world.run()["state"], world.run()["rounds"][0]["failed"]) == ("finished", 1)


def test_a_device_without_signs_has_its_deadline(
    world: World, working: tuple[FakeDevice, FakeDevice, Any]
) -> None:
    """A device that never gave a sign, as older ones do not, keeps its place until the deadline."""
    first, _, task = working
    world.clock.now_s += PLENTY_S - 10
    world.play()
    assert first.deliver(first.result(task)).json() == {"status": "counted"}
    assert say(first, task.task_id) == Standing(EVERY_S)


def test_signs_do_not_move_the_deadline(world: World, working: tuple[FakeDevice, FakeDevice, Any]) -> None:
    """However often a device says that it works, its deadline stays."""
    first, second, task = working
    for _ in range(12):
        world.clock.now_s += PLENTY_S / 10
        say(first, task.task_id)
        second.check_in()
        world.play()
    assert "device_late" in codes(world) or "device_lost" in codes(world)
    assert not say(first, task.task_id).wanted


def test_a_restart_counts_against_nobody(world: World, working: tuple[FakeDevice, FakeDevice, Any]) -> None:
    """Signs that no coordinator was there to hear are not missed."""
    first, _, task = working
    say(first, task.task_id)
    world.clock.now_s += 100 * EVERY_S
    world.start()
    state_machine.resume(world.stores, world.clock.now_s)
    world.play()
    assert say(first, task.task_id).wanted
    world.clock.now_s += MISSED_SIGNS * EVERY_S + 1
    world.play()
    assert codes(world)[-1] == "device_lost"


def test_signs_for_others_are_refused(world: World, working: tuple[FakeDevice, FakeDevice, Any]) -> None:
    """Nobody speaks for another's task, or for one that is not; and a stopped run wants no more work."""
    first, second, task = working
    before = world.dump()
    for device, task_id, code in ((second, task.task_id, "not_your_task"), (first, "none", "unknown_task")):
        answer = device.send("POST", f"/v1/tasks/{task_id}/alive")
        assert messages.decode(answer.content, Refusal).code == code
    assert world.dump() == before
    world.admin("POST", "/v1/admin/runs/latest/stop")
    assert say(first, task.task_id) == Standing(EVERY_S, wanted=False)
