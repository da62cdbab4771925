"""Results that come after their deadline: taken within the grace that the run states, if their place is still free."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import Refusal
from tests.coordinator.conftest import FakeDevice, World

DEADLINE_S = 60.0
GRACE_S = 30.0


def late(world: World, by_s: float, **changed: Any) -> tuple[FakeDevice, FakeDevice, Any]:
    """A device whose task is past its deadline by so much, with its place offered to another; both, and the task."""
    world.fleet("a", "b")
    settings = {"devices_per_round": 1, "min_devices": 2, "rounds": 1, "selection_timeout_s": 1000.0}
    world.create_run(**{**settings, "deadline_s": DEADLINE_S, "late_grace_s": GRACE_S, **changed})
    world.play()
    first = next(device for device in world.devices.values() if device.task() is not None)
    second = next(device for device in world.devices.values() if device is not first)
    task = first.task()
    world.clock.now_s += DEADLINE_S + by_s
    world.play()
    return first, second, task


def code(answer: Any) -> str:
    """What became of a result."""
    if answer.status_code == 200:
        return str(answer.json()["status"])
    return messages.decode(answer.content, Refusal).code


def test_a_late_result_counts_within_the_grace(world: World) -> None:
    """It fills the place that was kept for another device, which gets no task then, and the round is committed."""
    first, second, task = late(world, GRACE_S - 1)
    assert code(first.deliver(first.result(task))) == "counted"
    assert second.task() is None
    world.play()
    run = world.run()
    assert (run["state"], run["rounds"][0]["devices"]) == ("finished", [first.name])
    assert code(first.deliver(first.result(task))) == "duplicate"


@pytest.mark.parametrize(("by_s", "changed"), [(GRACE_S + 1, {}), (1.0, {"late_grace_s": 0.0})])
def test_beyond_the_grace_it_is_stale(world: World, by_s: float, changed: dict[str, Any]) -> None:
    """After the grace, or without one, nothing changes."""
    first, _, task = late(world, by_s, **changed)
    before = world.dump()
    assert code(first.deliver(first.result(task))) == "stale"
    assert world.dump() == before


def test_a_place_that_was_taken_stays_taken(world: World) -> None:
    """Once another device works on the place, or has filled it, a late result is stale."""
    first, second, task = late(world, 1.0)
    other = second.task()
    assert other is not None
    assert code(first.deliver(first.result(task))) == "stale"
    assert code(second.deliver(second.result(other))) == "counted"
    assert code(first.deliver(first.result(task))) == "stale"


def test_only_time_is_forgiven(world: World) -> None:
    """A task that its device gave back is not taken up by a result."""
    first, _, task = late(world, -DEADLINE_S)
    back = messages.DeviceEvent("task_failed", "no", task.task_id)
    first.send("POST", "/v1/events", messages.encode(back))
    assert code(first.deliver(first.result(task))) == "stale"


def test_a_round_waits_for_the_grace_alone(world: World) -> None:
    """With nobody else to ask, a round is abandoned only after the grace; a late result saves it."""
    (device,) = world.fleet("a")
    settings = {"devices_per_round": 1, "min_devices": 1, "rounds": 1, "max_abandoned": 9}
    world.create_run(**settings, deadline_s=DEADLINE_S, late_grace_s=GRACE_S)
    for by_s, state in ((GRACE_S + 2, "abandoned"), (GRACE_S - 2, "committed")):
        world.play()
        device.check_in()
        world.play()
        task = device.task()
        assert task is not None
        world.clock.now_s += DEADLINE_S + 1
        world.play()
        world.clock.now_s += by_s - 1
        world.play()
        if state == "committed":
            assert code(device.deliver(device.result(task))) == "counted"
        world.play()
        assert world.run()["rounds"][task.round]["state"] == state
