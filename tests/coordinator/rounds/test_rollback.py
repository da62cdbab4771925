"""A run goes back to a round: what came later counts no more, and stays in the history."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.rounds.rollback import MOST_STATES
from coordinator.rounds.runs import find_run
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import Refusal, Standing
from tests.coordinator.conftest import FakeDevice, World

#: Server optimisers with moments, a mean over rounds, and compared directions: all that a run keeps beside its values.
KEPT: dict[str, Any] = {
    "server_optimizer": {"slices": {"name": "yogi", "rate": 0.1}, "head": {"name": "momentum"}},
    "average_from_round": 0,
    "directions": "filtered",
    "candidates": 2,
}


def back(world: World, to: int) -> Any:
    """The answer to a request to go back."""
    return world.admin("POST", "/v1/admin/runs/latest/rollback", {"to": to})


def standing(world: World) -> tuple[object, ...]:
    """All that the next round hangs on but its number."""
    with world.stores.storage.reading() as connection:
        run = find_run(world.stores, connection, "latest")
    kept = world.stores.private_blobs.get(run.optimizer_sha256 or "")
    shas = (run.values_sha256, run.average_sha256, run.reference_sha256)
    return *shas, kept, run.committed, run.rounds_done, run.phase, run.delta_sizes


def test_a_run_stands_where_it_stood(world: World) -> None:
    """Values, moments, mean, reference and counts are those after the round, and the run goes on to its end."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=4, **KEPT)
    world.work(devices)
    stood = standing(world)
    world.work(devices)
    world.work(devices)
    assert standing(world) != stood
    assert back(world, 0).json()["taken_back"] == 2
    assert standing(world) == stood
    assert [row["rolled_back"] for row in world.run()["rounds"]] == [False, True, True]
    assert back(world, 0).json()["taken_back"] == 0  # it is so already
    for _ in range(3):
        world.work(devices)
    run = world.run()
    assert (run["state"], run["rounds_committed"]) == ("finished", 4)
    assert [row["round"] for row in run["rounds"]] == [0, 1, 2, 3, 4, 5]
    assert [event["code"] for event in world.admin("GET", "/v1/admin/runs/latest/events").json()].count(
        "run_rolled_back"
    ) == 1


@pytest.mark.parametrize("report", ["weights", "scalars"])
def test_going_back_is_as_if_the_rounds_had_been_abandoned(
    world: World, tmp_path_factory: Any, report: str
) -> None:
    """The rounds after going back end in the bits of a run whose rounds in between brought nothing.

    Scalars are replayed from the values and the compared directions that the run stands at again.
    """
    devices = world.fleet("a", "b")
    world.create_run(rounds=3, report=report, **KEPT)
    world.work(devices)
    world.work(devices)
    back(world, 0)
    world.start()  # a restart in between keeps it
    world.work(devices)
    world.work(devices)
    assert world.run()["state"] == "finished"
    other = World(tmp_path_factory.mktemp("other"), world.publisher)
    fellows = other.fleet("a", "b")
    other.create_run(rounds=3, report=report, **KEPT)
    other.work(fellows)
    other.play()  # round 1 opens, and nobody comes
    for _ in range(3):
        other.clock.now_s += 70
        other.play()
    assert other.round_state() == "abandoned"
    for device in fellows:
        device.check_in()
    other.work(fellows)
    other.work(fellows)
    assert [row["state"] for row in other.run()["rounds"]] == [
        "committed",
        "abandoned",
        "committed",
        "committed",
    ]
    assert other.values() == world.values()
    other.stores.storage.close()


def test_who_works_on_a_later_round_is_told(world: World) -> None:
    """A device in mid-task learns by its next sign of life, and its result is refused as stale; nothing is counted."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=3)
    world.work(devices)
    world.play()
    pairs = [(device, device.task()) for device in devices]
    device, task = pairs[0]
    assert task is not None
    assert device.deliver(device.result(task)).json() == {"status": "counted"}
    other, open_task = pairs[1]
    assert open_task is not None
    assert wanted(other, open_task.task_id)
    assert back(world, 0).json()["taken_back"] == 1
    assert not wanted(other, open_task.task_id)
    answer = other.deliver(other.result(open_task))
    assert (answer.status_code, answer.json()["code"]) == (409, "stale")
    assert "rolled_back" in answer.json()["message"]
    assert world.run()["rounds"][1]["reason"] == "rolled back to round 0 by the operator"
    world.work(devices)
    assert world.run()["rounds_committed"] == 2


def wanted(device: FakeDevice, task_id: str) -> bool:
    """Whether a device's result is still wanted, as its sign of life is answered."""
    answer = device.send("POST", f"/v1/tasks/{task_id}/alive")
    return messages.decode(answer.content, Standing).wanted


@pytest.mark.parametrize("to", [1, 7])
def test_only_to_what_was_committed(world: World, to: int) -> None:
    """A round that was not committed, or that was itself taken back, is refused with those that are possible."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=4)
    assert back(world, 0).status_code == 409  # it has not begun
    world.work(devices)
    world.work(devices)
    back(world, 0)
    before = world.dump()
    answer = back(world, to)
    refusal = messages.decode(answer.content, Refusal)
    assert (answer.status_code, refusal.code) == (404, "unknown_round")
    assert "to rounds 0 to 0" in refusal.message
    assert world.dump() == before


def test_an_ended_run_stays_and_points_to_releases(world: World) -> None:
    """A finished run cannot go back, and the way out that its message names works: an earlier round is published."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=3)
    for _ in range(3):
        world.work(devices)
    answer = back(world, 0)
    assert (answer.status_code, answer.json()["code"]) == (409, "run_ended")
    assert "publish an earlier round" in answer.json()["message"]
    assert world.admin("POST", "/v1/admin/releases", {"round": 0}).status_code == 201


def test_a_round_that_was_taken_back_is_not_published(world: World) -> None:
    """Releases are of rounds that count; the values after the round before are those that training goes on from."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=4)
    world.work(devices)
    after_first = world.run()["values_sha256"]
    world.work(devices)
    back(world, 0)
    world.work(devices)
    assert world.admin("POST", "/v1/admin/releases", {"round": 1}).json()["code"] == "unknown_round"
    assert world.admin("POST", "/v1/admin/releases", {"round": 0}).json()["values_sha256"] == after_first


def test_server_states_do_not_pile_up(world: World) -> None:
    """Of a long run the states of the newest rounds are kept, and going further back is refused."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=MOST_STATES + 5, server_optimizer=KEPT["server_optimizer"])
    for _ in range(MOST_STATES + 3):
        world.work(devices)
    private = [path for path in (world.folder / "state" / "private").glob("*/*") if path.is_file()]
    assert len(private) == MOST_STATES
    assert back(world, 1).json()["code"] == "unknown_round"
    assert back(world, 3).json()["taken_back"] == MOST_STATES - 1
