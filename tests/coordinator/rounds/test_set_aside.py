"""Devices that a run asks no more: for a lasting cause, or after failures in a row; and how they come back."""

from __future__ import annotations

import pytest

from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, DeviceEvent, NotEligible, Task
from tests.coordinator.conftest import FakeDevice, World

WRONG_KEY = "SignatureError: package was not signed by the publisher key of this device"


def fails(device: FakeDevice, task: Task, code: str = "task_failed", *, lasting: bool = False) -> None:
    """Give a task back."""
    event = DeviceEvent(code, WRONG_KEY if lasting else "WorkerError: killed", task.task_id, lasting)
    answer = device.send("POST", "/v1/events", messages.encode(event))
    assert answer.status_code == 204, answer.text


def holder(world: World, number: int | None = None) -> tuple[FakeDevice, Task]:
    """A device that gets a task, and the task."""
    for device in world.devices.values():
        task = device.task()
        if task is not None and (number is None or task.round == number):
            return device, task
    raise AssertionError("nobody has a task")


def standing(world: World, name: str) -> tuple[str, str]:
    """State and reason of a device in the list of all devices."""
    (found,) = [d for d in world.admin("GET", "/v1/admin/devices").json() if d["name"] == name]
    return found["state"], found["reason"]


def test_a_lasting_cause_costs_one_task(world: World) -> None:
    """A device whose publisher key is wrong fails once, is told why, and no later round asks it."""
    world.fleet("a", "b", "c")
    world.create_run(rounds=4, devices_per_round=3)
    world.play()
    bad, task = holder(world)
    fails(bad, task, lasting=True)
    others = [device for device in world.devices.values() if device is not bad]
    for _ in range(4):
        answer = bad.check_in()
        assert isinstance(answer, NotEligible)
        assert (answer.code, WRONG_KEY in answer.message) == ("set_aside", True)
        world.work(others)
    run = world.run()
    assert (run["state"], [entry["failed"] for entry in run["rounds"]]) == ("finished", [1, 0, 0, 0])
    assert [(entry["device"], entry["reason"]) for entry in run["set_aside"]] == [(bad.name, WRONG_KEY)]
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    assert [event["device"] for event in events if event["code"] == "device_set_aside"] == [bad.name]


def test_what_may_pass_is_borne_twice(world: World) -> None:
    """Two failures in a row that may pass change nothing, the third sets the device aside, a result starts anew."""
    (bad,) = world.fleet("a")
    world.create_run(rounds=9, devices_per_round=1, min_devices=1, max_abandoned=9)
    for failure in (True, True, False, True, True, True):
        assert standing(world, "a")[0] != "set aside"
        world.play()
        task = bad.task()
        assert task is not None
        if failure:
            fails(bad, task, "out_of_memory")
        else:
            assert bad.deliver(bad.result(task)).json() == {"status": "counted"}
        if standing(world, "a")[0] != "set aside":
            world.play()
    assert standing(world, "a") == (
        "set aside",
        "3 tasks failed in a row; the last: WorkerError: killed",
    )


@pytest.mark.parametrize(
    "changed", [{"setup": "another digest"}, {"runtime_version": "newer"}, {"cap_bytes": 2 << 30}]
)
def test_a_device_that_was_set_up_anew_is_asked_again(world: World, changed: dict[str, object]) -> None:
    """A check-in with another setup, version or cap ends the set-aside; the same one again does not."""
    world.fleet("a", "b", "c")
    world.create_run(devices_per_round=3)
    world.play()
    bad, task = holder(world)
    fails(bad, task, lasting=True)
    assert isinstance(bad.check_in(), NotEligible)
    same = {
        "runtime_version": "test",
        "cap_bytes": bad.cap_bytes,
        "floor_bytes": 1 << 20,
        "example_count": 10,
    }
    request = CheckInRequest(**{**same, **changed})  # type: ignore[arg-type]
    answer = bad.send("POST", "/v1/check-in", messages.encode(request)).json()
    assert answer["answer"] == "come_back"
    assert standing(world, bad.name)[0] == "ready"
    assert world.run()["set_aside"] == []


def test_an_operator_resumes_a_device(world: World) -> None:
    """At the operator's word a device is asked again; one that is not set aside, or not known, is refused."""
    world.fleet("a", "b", "c")
    world.create_run(devices_per_round=3)
    world.play()
    bad, task = holder(world)
    fails(bad, task, lasting=True)
    answer = world.admin("POST", f"/v1/admin/devices/{bad.name}/resume")
    assert (answer.status_code, answer.json()["name"]) == (200, bad.name)
    assert not isinstance(bad.check_in(), NotEligible)
    again = world.admin("POST", f"/v1/admin/devices/{bad.name}/resume")
    assert (again.status_code, again.json()["code"]) == (409, "not_set_aside")
    unknown = world.admin("POST", "/v1/admin/devices/nobody/resume")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_device")


def test_a_device_that_trusts_no_task_gets_none(world: World) -> None:
    """A task that the device cannot trust goes to another at once, though its event names none."""
    world.fleet("a", "b", "c")
    world.create_run(devices_per_round=3)
    world.play()
    bad, task = holder(world)
    event = DeviceEvent("task_untrusted", "SignatureError: not signed by the pinned key")
    bad.send("POST", "/v1/events", messages.encode(event))
    assert standing(world, bad.name) == ("set aside", event.message)
    world.play()
    assert task.task_id not in [task.task_id for _, task in [holder(world)]]


def test_a_run_without_enough_devices_ends_and_says_why(world: World) -> None:
    """Where those that are left can never be enough, the run fails with the devices and the reason."""
    world.fleet("a", "b")
    world.create_run(min_results=2)
    world.play()
    bad, task = holder(world)
    fails(bad, task, lasting=True)
    for _ in range(3):
        world.play()
        world.work([device for device in world.devices.values() if device is not bad])
    run = world.run()
    assert run["state"] == "failed"
    assert f"1 devices are left of at least 2; set aside: {bad.name}" in run["reason"]
    assert WRONG_KEY in run["reason"]


def test_another_run_asks_everybody_again(world: World) -> None:
    """A device is set aside for one run: the next, of another package perhaps, asks it."""
    world.fleet("a", "b", "c")
    first = world.create_run(devices_per_round=3)
    world.play()
    bad, task = holder(world)
    fails(bad, task, lasting=True)
    world.admin("POST", f"/v1/admin/runs/{first}/stop")
    world.create_run(devices_per_round=3)
    world.play()
    assert bad.task() is not None
