"""Clocks that are set while a run goes on, or between two: nothing is held, lost, or accepted twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coordinator import auth
from coordinator.clock import SteadyClock, StepWatch
from coordinator.rounds import state_machine
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, Refusal
from tests.coordinator.api.raw import raw_request
from tests.coordinator.conftest import World

CHECK_IN = messages.encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))
DAY_S = 86400.0


class Hands:
    """A clock whose hands somebody turns."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def __call__(self) -> float:
        return self.at_s


@pytest.mark.parametrize("step_s", [DAY_S, -DAY_S, 3600.0, -301.0])
def test_steady_time_counts_on(step_s: float) -> None:
    """Setting the wall clock moves nothing; the step is told once, and so is the step back."""
    wall, monotonic = Hands(1.7e9), Hands(50.0)
    steady = SteadyClock(wall, monotonic)
    watch = StepWatch(steady, wall)
    for hand in (wall, monotonic):
        hand.at_s += 10.0
    assert (steady(), watch.step_s()) == (1.7e9 + 10.0, 0.0)
    wall.at_s += step_s
    assert (steady(), watch.step_s(), watch.step_s()) == (1.7e9 + 10.0, step_s, 0.0)
    wall.at_s -= step_s
    assert watch.step_s() == -step_s


def answer_code(answer: object) -> str:
    """200, or the code of the refusal."""
    if answer.status_code == 200:  # type: ignore[attr-defined]
        return "200"
    return messages.decode(answer.content, Refusal).code  # type: ignore[attr-defined]


def check_in(world: World, created_s: float, headers: dict[str, str] | None = None) -> str:
    """What comes of a check-in that was signed at a moment."""
    device = world.devices["a"]
    headers = headers or device.headers("POST", "/v1/check-in", CHECK_IN, now_s=int(created_s))
    return answer_code(world.client.post("/v1/check-in", content=CHECK_IN, headers=headers))


def test_a_request_that_takes_its_time_counts_once(world: World) -> None:
    """Begun at +299 s and ended at +303 s, the same request is accepted once; its nonce outlives its window."""
    (device,) = world.fleet("a")
    created_s = world.clock.now_s

    headers = device.headers("POST", "/v1/check-in", CHECK_IN)
    meanwhile = []

    def slowly() -> Iterator[bytes]:
        yield CHECK_IN[:10]
        meanwhile.append(check_in(world, 0, headers))
        world.clock.now_s += 4
        keep_house(world)
        meanwhile.append(check_in(world, 0, headers))
        yield CHECK_IN[10:]

    world.clock.now_s = created_s + 299
    assert answer_code(raw_request(world, "POST", "/v1/check-in", headers, slowly())) == "200"
    assert meanwhile == ["replayed", "clock_off"]
    for later_s in (300, 301, 302, 303, 600, 602):
        world.clock.now_s = created_s + later_s
        keep_house(world)
        assert check_in(world, 0, headers) in {"replayed", "clock_off"}


def keep_house(world: World) -> None:
    """Forget what nobody needs any more."""
    with world.stores.storage.transaction() as connection:
        auth.forget_nonces(connection, now_s=world.clock.now_s, wall_s=world.wall())


def test_either_clock_will_do(world: World) -> None:
    """A server whose clock is set, wrongly or at last rightly, refuses nobody who fits one of its two times."""
    world.fleet("a")
    true_s = world.clock.now_s
    for step_s in (DAY_S, -DAY_S):
        world.wall = Hands(true_s + step_s)
        world.start()
        assert check_in(world, true_s) == "200"
        assert check_in(world, true_s + step_s) == "200"
        assert check_in(world, true_s + step_s / 2) == "clock_off"


def test_a_clock_set_back_revives_no_request(world: World) -> None:
    """A request that was accepted, and whose nonce was forgotten, is refused when a clock is set back to its time."""
    (device,) = world.fleet("a")
    created_s = world.clock.now_s
    headers = device.headers("POST", "/v1/check-in", CHECK_IN)
    assert check_in(world, 0, headers) == "200"
    world.clock.now_s += 1000
    keep_house(world)
    with world.stores.storage.reading() as connection:
        assert connection.execute("SELECT count(*) FROM nonces").fetchone()[0] == 0
    assert check_in(world, world.clock.now_s) == "200"
    for wall in (Hands(created_s), Hands(created_s + 100)):
        world.wall = wall
        world.start()
        assert check_in(world, 0, headers) == "clock_off"


@pytest.mark.parametrize("back_s", [400.0, 3600.0, DAY_S])
def test_a_clock_set_back_between_two_starts_holds_no_place(world: World, back_s: float) -> None:
    """After a restart with the clock set back, places wait no longer than they would have, for devices no less live."""
    world.fleet("a", "b", "c")
    world.create_run(devices_per_round=1, min_devices=3, rounds=1)
    world.play()
    (before,) = due(world)
    was_s = world.clock.now_s
    world.clock.now_s -= back_s
    world.start()
    state_machine.resume(world.stores, world.clock.now_s)
    (after,) = due(world)
    assert after - world.clock.now_s == pytest.approx(before - was_s, abs=1.0)
    codes = [event["code"] for event in world.admin("GET", "/v1/admin/runs/latest/events").json()]
    assert "clock_set" in codes
    world.clock.now_s += 11
    world.play()
    assert len(due(world)) == 1
    taken = [device for device in world.devices.values() if device.task() is not None]
    assert len(taken) == 1


def due(world: World) -> list[float]:
    """Until when the open tasks wait."""
    with world.stores.storage.reading() as connection:
        rows = connection.execute("SELECT due_s FROM tasks WHERE state IN ('reserved', 'working')")
        return [float(row[0]) for row in rows]
