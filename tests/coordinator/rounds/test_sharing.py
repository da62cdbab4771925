"""Several runs at once: a device trains one task at a time, and runs share the devices by a stated rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rounds.sharing import Claim, shares
from coordinator.storage import round_rows
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import ComeBack, Task
from tests.coordinator.conftest import FakeDevice, World


def claim(run_id: str, least: int, most: int, *, waits: bool = False, is_lasting: bool = False) -> Claim:
    """A claim of a run."""
    return Claim(run_id, least, most, waits, is_lasting)


@pytest.mark.parametrize(
    ("claims", "devices", "expected"),
    [
        ([claim("a", 1, 10), claim("b", 1, 10)], 10, {"a": 5, "b": 5}),
        ([claim("a", 1, 10), claim("b", 1, 2)], 10, {"a": 8, "b": 2}),
        ([claim("a", 1, 10), claim("b", 7, 10)], 10, {"a": 3, "b": 7}),
        ([claim("a", 1, 3), claim("b", 1, 3)], 10, {"a": 3, "b": 3}),
        ([claim("a", 8, 10), claim("b", 8, 10)], 10, {"a": 8, "b": 8}),
        ([claim("a", 1, 4, is_lasting=True), claim("b", 8, 10, waits=True)], 8, {"a": 0, "b": 8}),
        ([claim("a", 1, 4, is_lasting=True), claim("b", 8, 10)], 8, {"a": 1, "b": 8}),
    ],
)
def test_shares(claims: list[Claim], devices: int, expected: dict[str, int]) -> None:
    """The rest above what each needs goes to whoever has least; where the least is too much, runs take turns."""
    assert shares(claims, devices) == expected


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20)), min_size=1, max_size=5), st.integers(0, 60))
def test_shares_are_max_min_fair(sizes: list[tuple[int, int]], devices: int) -> None:
    """Nobody could have one more without somebody having fewer who has no more already; nothing lies idle."""
    claims = [claim(str(number), least, least + more) for number, (least, more) in enumerate(sizes)]
    given_ = shares(claims, devices)
    total = sum(given_.values())
    if sum(each.least for each in claims) > devices:
        assert all(given_[each.run_id] == each.least for each in claims)
        return
    assert total == min(devices, sum(each.most for each in claims))
    for each in claims:
        if given_[each.run_id] < each.most:
            others = [given_[o.run_id] for o in claims if given_[o.run_id] > o.least]
            assert all(other <= given_[each.run_id] + 1 for other in others)


def tasks_of(devices: list[FakeDevice]) -> dict[str, list[tuple[FakeDevice, Task]]]:
    """The tasks that devices get when they check in, by the name of the run."""
    found: dict[str, list[tuple[FakeDevice, Task]]] = {}
    for device in devices:
        task = device.task()
        if task is not None:
            found.setdefault(task.run_id.rpartition("-")[0], []).append((device, task))
    return found


def two_runs(world: World, **changed: object) -> None:
    """Two runs that go on beside each other."""
    for name in ("first", "second"):
        world.create_run(name=name, beside_others=True, min_devices=1, **changed)


def states(world: World) -> list[str]:
    """The state of each run, oldest first."""
    return [row["state"] for row in world.admin("GET", "/v1/admin/runs").json()]


def test_two_runs_share_a_fleet(world: World) -> None:
    """Both open a round with half of the devices each, no device has two tasks, and both come to their ends."""
    devices = world.fleet(*"abcdef")
    two_runs(world, devices_per_round=6, rounds=2)
    for _ in range(2):
        world.play()
        held = tasks_of(devices)
        assert {name: len(pairs) for name, pairs in held.items()} == {"first": 3, "second": 3}
        assert len({device.name for pairs in held.values() for device, _ in pairs}) == 6
        again = tasks_of(devices)  # asking again brings the same task, never another run's
        assert again == held
        for device, task in (pair for pairs in held.values() for pair in pairs):
            assert device.deliver(device.result(task)).json() == {"status": "counted"}
        world.play()
    assert states(world) == ["finished", "finished"]


def test_one_device_serves_runs_in_turn(world: World) -> None:
    """With a single device rounds alternate, and a restart changes nothing of it."""
    (device,) = world.fleet("a")
    two_runs(world, devices_per_round=1, rounds=2)
    order = []
    for _ in range(4):
        world.clock.now_s += 1
        world.play()
        world.start()
        task = device.task()
        assert task is not None
        order.append(task.run_id.rpartition("-")[0])
        device.deliver(device.result(task))
        world.play()
    assert order == ["first", "second", "first", "second"]
    assert states(world) == ["finished", "finished"]


def test_a_run_that_does_not_say_so_waits(world: World) -> None:
    """Without ``beside_others`` a run waits for the others, and those behind it wait for it."""
    world.fleet("a", "b")
    world.create_run(name="first", beside_others=True)
    world.create_run(name="alone")
    world.create_run(name="last", beside_others=True)
    world.play()
    assert states(world) == ["running", "queued", "queued"]
    first = world.admin("GET", "/v1/admin/runs").json()[0]["run_id"]
    world.admin("POST", f"/v1/admin/runs/{first}/stop")
    world.play()
    assert states(world) == ["stopped", "running", "queued"]


def test_a_paused_run_leaves_its_share(world: World) -> None:
    """While one run is paused the other has the whole fleet, and a device that waits is told to come back."""
    devices = world.fleet(*"abcd")
    two_runs(world, devices_per_round=3, rounds=1)
    first = world.admin("GET", "/v1/admin/runs").json()[0]["run_id"]
    world.admin("POST", f"/v1/admin/runs/{first}/pause")
    world.play()
    held = tasks_of(devices)
    assert {name: len(pairs) for name, pairs in held.items()} == {"second": 3}
    idle = next(device for device in devices if device not in [pair[0] for pair in held["second"]])
    assert isinstance(idle.check_in(), ComeBack)


def test_a_damaged_run_leaves_the_others_alone(world: World) -> None:
    """Values that are gone fail their own run; the other goes on."""
    devices = world.fleet("a", "b")
    two_runs(world, devices_per_round=1, rounds=1)
    world.play()
    held = tasks_of(devices)
    ((device, task),) = held["first"]
    device.deliver(device.result(task))
    with world.stores.storage.transaction() as connection:
        connection.execute("UPDATE runs SET values_sha256 = ? WHERE run_id = ?", ("0" * 64, task.run_id))
    world.play()
    assert states(world) == ["failed", "running"]
    ((other, other_task),) = held["second"]
    assert other.deliver(other.result(other_task)).json() == {"status": "counted"}
    world.play()
    assert states(world) == ["failed", "finished"]


def test_a_place_waits_for_a_device_that_is_busy_elsewhere(world: World) -> None:
    """A round whose device gave up is not abandoned while one that works for another run could still take the place."""
    devices = world.fleet("a", "b")
    two_runs(world, devices_per_round=1, rounds=1)
    world.play()
    held = tasks_of(devices)
    ((device, task),) = held["first"]
    refused = messages.DeviceEvent("task_refused", "no", task.task_id)
    device.send("POST", "/v1/events", messages.encode(refused))
    world.play()
    ((other, other_task),) = held["second"]
    other.deliver(other.result(other_task))
    world.play(2)
    replacement = other.task()
    assert replacement is not None
    assert replacement.run_id == task.run_id


def test_bytes_belong_to_the_run_that_a_device_worked_for(world: World) -> None:
    """With two open rounds what a device sends counts to its own run's round alone."""
    devices = world.fleet("a", "b")
    two_runs(world, devices_per_round=1, rounds=1)
    world.play()
    held = tasks_of(devices)
    world.app.state.app_state.traffic.take()
    ((device, task),) = held["first"]
    device.deliver(device.result(task))
    with world.stores.storage.transaction() as connection:
        round_rows.add_bytes_of(connection, world.app.state.app_state.traffic.take())
    rounds = [
        world.admin("GET", f"/v1/admin/runs/{pairs[0][1].run_id}").json()["rounds"][0]
        for pairs in held.values()
    ]
    up = {name: row["bytes_up"] for name, row in zip(held, rounds, strict=True)}
    assert up["first"] > 0
    assert up["second"] == 0


def test_a_round_asks_more_than_it_needs(world: World) -> None:
    """With ``enough_results`` a round closes at the first so many, and whoever is still at work is told."""
    devices = world.fleet("a", "b", "c")
    world.create_run(devices_per_round=3, min_devices=3, enough_results=2, min_results=2, rounds=1)
    world.play()
    pairs = [(device, device.task()) for device in devices]
    for device, task in pairs[:2]:
        assert task is not None
        device.deliver(device.result(task))
    world.play()
    run = world.run()
    assert (run["state"], run["rounds"][0]["results"]) == ("finished", 2)
    device, task = pairs[2]
    assert task is not None
    assert device.send("POST", f"/v1/tasks/{task.task_id}/alive").json()["wanted"] is False
