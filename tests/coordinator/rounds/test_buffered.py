"""Buffered runs: the values move as soon as so many results are in, scaled by their age, and nobody waits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edge_runtime.package.slices import Values, decode_values
from edge_runtime.protocol.messages import Task
from tests.coordinator.conftest import SPECS, FakeDevice, World

#: Three devices at work, a step with every second result.
BUFFER: dict[str, Any] = {
    "split": "whole",
    "devices_per_round": 3,
    "min_devices": 3,
    "buffer_size": 2,
    "rounds": 3,
    "seen_window_s": 3600.0,
}
Held = tuple[FakeDevice, Task]


def begin(world: World, **changed: Any) -> list[Held]:
    """A run whose devices are all at work."""
    world.fleet("a", "b", "c")
    world.create_run(**{**BUFFER, **changed})
    world.play()
    return sorted(held(world), key=lambda pair: pair[0].name)


def held(world: World) -> list[Held]:
    """The tasks that devices hold."""
    asked = [(device, device.task()) for device in world.devices.values()]
    return [(device, task) for device, task in asked if task is not None]


def deliver(device: FakeDevice, task: Task) -> Any:
    """Hand a result in."""
    return device.deliver(device.result(task)).json()


def values(world: World) -> Values:
    """The current values."""
    return decode_values(world.values(), SPECS)


def mean(*weighed: tuple[Held, float]) -> Values:
    """The mean change by hand: each change scaled, weighed by its examples."""
    total: dict[str, Any] = {}
    examples = 0
    for (device, task), scale in weighed:
        result = device.result(task)
        examples += result.examples
        for name, array in decode_values(result.change, SPECS).items():
            total[name] = total.get(name, 0.0) + array.astype(np.float64) * scale * result.examples
    return {name: array / examples for name, array in total.items()}


def moved(before: Values, change: Values) -> Values:
    """Values after a step of FedAvg."""
    return {name: (before[name] + change[name]).astype(np.float32) for name in before}


def assert_same(found: Values, expected: Values) -> None:
    """Equal up to the last rounding."""
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-7)


def test_the_values_move_with_every_full_buffer(world: World) -> None:
    """Two of three results make a step; the third, from before it, enters the next one by 1/sqrt(2) of its size."""
    first, second, slow = begin(world)
    start = values(world)
    assert deliver(*first) == {"status": "counted"}
    world.play()
    assert world.run()["rounds_committed"] == 0
    assert deliver(*second) == {"status": "counted"}
    world.play()
    assert world.run()["rounds_committed"] == 1
    after = moved(start, mean((first, 1.0), (second, 1.0)))
    assert_same(values(world), after)
    world.play()
    again = [pair for pair in held(world) if pair[1].task_id != slow[1].task_id]
    assert {pair[0].name for pair in again} == {first[0].name, second[0].name}
    assert all(pair[1].state != slow[1].state for pair in again)
    assert deliver(*slow) == {"status": "counted"}
    fresh = again[0]
    assert deliver(*fresh) == {"status": "counted"}
    world.play()
    assert world.run()["rounds_committed"] == 2
    assert_same(values(world), moved(after, mean((slow, 1 / math.sqrt(2)), (fresh, 1.0))))
    rounds = world.run()["rounds"]
    assert sorted(rounds[1]["devices"]) == sorted([slow[0].name, fresh[0].name])


def play_on(world: World, *, restart: bool) -> bytes:
    """A whole run in which one device is slow, with or without a restart between any two requests; its values."""
    pace = {"a": 1, "b": 1, "c": 3}
    done = dict.fromkeys(pace, 0)
    for _ in range(60):
        for name, every in pace.items():
            done[name] += 1
            task = world.devices[name].task()
            if restart:
                world.start()
            if task is not None and done[name] % every == 0:
                world.devices[name].deliver(world.devices[name].result(task))
            if restart:
                world.start()
            world.play()
            if restart:
                world.start()
        if world.run()["state"] == "finished":
            return world.values()
    raise AssertionError(world.run())


@pytest.mark.parametrize("changed", [{}, {"split": "cyclic", "robust_mean": "median", "buffer_size": 4}])
def test_the_same_bits_whenever_it_is_killed(world: World, tmp_path_factory: Any, changed: Any) -> None:
    """A coordinator that is started anew between any two requests ends in the bits of one that ran through."""
    begin(world, **changed)
    through = play_on(world, restart=False)
    other = World(tmp_path_factory.mktemp("other"), world.publisher)
    begin(other, **changed)
    assert play_on(other, restart=True) == through
    assert [row["results"] for row in other.run()["rounds"]] == [
        row["results"] for row in world.run()["rounds"]
    ]
    other.stores.storage.close()


def test_what_is_too_stale_is_told_and_refused(world: World) -> None:
    """After more steps than ``max_staleness`` a device learns that nobody wants its result, which is refused."""
    first, second, slow = begin(world, max_staleness=0)
    device, task = slow
    assert device.send("POST", f"/v1/tasks/{task.task_id}/alive").json()["wanted"]
    deliver(*first)
    deliver(*second)
    answer = device.deliver(device.result(task))  # the buffer is full: it would enter the next round
    assert (answer.status_code, answer.json()["code"]) == (409, "stale")
    world.play()
    assert not device.send("POST", f"/v1/tasks/{task.task_id}/alive").json()["wanted"]
    world.play()
    assert len(held(world)) == 3


def test_a_buffer_that_does_not_fill_is_used_at_its_deadline(world: World) -> None:
    """With too few results until the deadline the values move by those; without any the round is abandoned by name."""
    first, *_ = begin(world, rounds=2)
    deliver(*first)
    world.clock.now_s += 71
    world.play()
    assert [row["state"] for row in world.run()["rounds"]] == ["committed"]
    world.play()
    for device in world.devices.values():
        device.check_in()
    world.clock.now_s += 200
    world.play(2)
    rounds = world.run()["rounds"]
    assert rounds[1]["state"] == "abandoned"
    assert rounds[1]["reason"] == "0 results of at least 1 in time, and no device at work"


def test_the_last_step_ends_the_run_for_all(world: World) -> None:
    """Once all steps are made, who is still at work is told, and the run has finished."""
    first, second, slow = begin(world, rounds=1)
    deliver(*first)
    deliver(*second)
    world.play()
    assert world.run()["state"] == "finished"
    device, task = slow
    assert not device.send("POST", f"/v1/tasks/{task.task_id}/alive").json()["wanted"]


def test_going_back_takes_back_what_waits(world: World) -> None:
    """A result that waits for the next round when the run goes back is not counted in it."""
    first, second, slow = begin(world)
    deliver(*first)
    deliver(*second)
    world.play(2)
    start = values(world)
    fresh = [pair for pair in held(world) if pair[1].task_id != slow[1].task_id]
    deliver(*slow)
    deliver(*fresh[0])
    deliver(*fresh[1])  # the buffer is full: it waits for round 2
    world.admin("POST", "/v1/admin/runs/latest/rollback", {"to": 0})
    world.play()
    pairs = held(world)
    assert len(pairs) == 3
    deliver(*pairs[0])
    world.play()
    assert world.run()["rounds_committed"] == 1
    deliver(*pairs[1])
    world.play()
    assert world.run()["rounds_committed"] == 2
    assert_same(values(world), moved(start, mean((pairs[0], 1.0), (pairs[1], 1.0))))


def test_buffers_leave_devices_to_a_run_that_waits(world: World) -> None:
    """Beside a run whose rounds need all devices, a buffered one hands out no task until that round is over."""
    world.fleet("a", "b")
    world.create_run(
        **{**BUFFER, "min_devices": 1, "devices_per_round": 2, "beside_others": True, "name": "buffered"}
    )
    world.play()
    pairs = held(world)
    assert len(pairs) == 2
    world.create_run(devices_per_round=2, min_results=2, beside_others=True, rounds=1, name="waits")
    for pair in pairs:
        deliver(*pair)
        world.play()
    world.play()
    assert {task.run_id.rpartition("-")[0] for _, task in held(world)} == {"waits"}
