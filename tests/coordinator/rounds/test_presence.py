"""Which devices a round asks: those that are there before those that are overdue, and nobody who is gone."""

from __future__ import annotations

from coordinator.rounds.presence import (
    MOST_PATIENCE_S,
    SLACK_S,
    WAY_S,
    askable,
    is_live,
    order_of_asking,
    patience_s,
)
from coordinator.rounds.runs import find_run
from coordinator.rounds.state_machine import resume
from coordinator.rounds.tasks import FINISHED_WINDOW_S, IDLE_WINDOW_S
from coordinator.storage.device_rows import SeenDevice
from edge_runtime.protocol.messages import ComeBack
from tests.coordinator.api.test_device_api import reserved
from tests.coordinator.conftest import ROW, World


def device(name: str, expected_s: float) -> SeenDevice:
    """A device that should ask again by some moment."""
    return SeenDevice(f"d-{name}", name, 1, expected_s - 1, expected_s)


def test_those_that_are_overdue_come_last() -> None:
    """The draw's order is kept within those that are live and those that are not."""
    everybody = [device(name, 100.0) for name in "abcdefgh"]
    drawn = [d.name for d in order_of_asking(everybody, 3, 0, 100.0)]
    late = set(drawn[:3])
    mixed = [device(d.name, 100.0 - (SLACK_S + 1) * (d.name in late)) for d in everybody]
    assert [d.name for d in order_of_asking(mixed, 3, 0, 100.0)] == [*drawn[3:], *drawn[:3]]
    assert is_live(device("a", 100.0), 100.0 + SLACK_S)
    assert not is_live(device("a", 100.0), 100.1 + SLACK_S)


def test_a_place_waits_as_long_as_its_device_was_told() -> None:
    """A place waits for its device's window to end where that is later than the run's own time, within bounds."""
    assert patience_s(device("a", 100.0), 10.0, 100.0) == 10.0
    assert patience_s(device("a", 130.0), 10.0, 100.0) == 30.0 + WAY_S
    assert patience_s(device("a", 9000.0), 10.0, 100.0) == MOST_PATIENCE_S + WAY_S
    assert patience_s(device("a", 50.0), 10.0, 100.0) == 10.0


def test_dead_devices_are_not_drawn_where_live_ones_are(world: World) -> None:
    """A device that fell silent is passed over in favour of those that ask, round after round."""
    devices = world.fleet(*"abcd")
    world.create_run(rounds=6)
    alive = devices[:2]
    world.clock.now_s += 3.0 + SLACK_S + 0.1
    for _ in range(6):
        for device in alive:
            device.check_in()
        world.play()
        assert {d.name for d in alive} >= set(reserved(world))
        world.work(alive)
    run = world.run()
    assert run["state"] == "finished"
    assert [entry["failed"] for entry in run["rounds"]] == [0] * 6


def test_devices_that_are_long_overdue_are_gone(world: World) -> None:
    """A first round that waits for so many devices does not count those that are gone."""
    devices = world.fleet("a", "b", "c")
    world.create_run(min_devices=3, devices_per_round=3)
    world.clock.now_s += 3.0 + 10.0 + 0.1  # the window, the time a place waits, and a little more
    devices[0].check_in()
    world.play()
    assert world.run()["rounds"] == []
    for device in devices[1:]:
        device.check_in()
    world.play()
    assert world.round_state() == "selecting"


def test_a_run_that_follows_another_finds_its_devices(world: World) -> None:
    """Devices that rest after a run, as long as they were told, keep their places in the next."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=1)
    world.work(devices)
    for device in devices:
        assert device.check_in().after_max_s == FINISHED_WINDOW_S[1]
    world.create_run(rounds=1, selection_timeout_s=5.0)
    world.play()
    world.clock.now_s += FINISHED_WINDOW_S[1] - 0.1  # the last moment at which they come back
    world.play()
    assert [device.task() is not None for device in devices] == [True, True]
    assert world.run()["rounds"][0]["failed"] == 0


def test_devices_come_back_sooner_where_another_run_waits(world: World) -> None:
    """While the last evaluation of a run goes on and the next is queued, devices rest as before any run."""
    data = world.folder / "dev.jsonl"
    data.write_text(ROW)
    (device,) = world.fleet("a")
    world.create_run(
        rounds=1, devices_per_round=1, min_devices=1, min_results=1, evaluation={"data": str(data)}
    )
    world.work([device])
    assert world.run()["state"] == "evaluating"
    assert device.check_in() == ComeBack(*FINISHED_WINDOW_S, "run finished")
    world.create_run(rounds=1)
    assert device.check_in() == ComeBack(*IDLE_WINDOW_S, "run finished")


def test_a_restart_makes_nobody_overdue(world: World) -> None:
    """Devices that were there when the coordinator died are live after its start, until their pauses are over."""
    world.fleet("a", "b", "c")
    world.clock.now_s += 600.0
    world.start()
    resume(world.stores, world.clock.now_s)
    run = world.create_run()
    world.clock.now_s += 29.0
    with world.stores.storage.reading() as connection:
        devices = askable(connection, find_run(world.stores, connection, run), world.clock.now_s)
    assert [is_live(device, world.clock.now_s) for device in devices] == [True] * 3
