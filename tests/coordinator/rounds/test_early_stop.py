"""Training that no longer gains anything: it stops, the best values stand, and the reason is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.rounds import evaluation
from edge_runtime.protocol.messages import MemoryReport
from edge_runtime.worker.jobs import EvaluateOutcome
from tests.coordinator.conftest import ROW, FakeDevice, World
from tests.coordinator.rounds.test_visits import TRAINED, trained, visit_round


@pytest.fixture
def evaluated(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that is evaluated after every round."""
    rows = tmp_path / "dev.jsonl"
    rows.write_text(ROW)
    return {"evaluation": {"data": str(rows)}}


def score(world: World, accuracy: float) -> list[int]:
    """Store this accuracy for every evaluation that waits; the rounds they were of."""
    rounds = []
    while (waiting := evaluation.next_evaluation(world.stores)) is not None:
        outcome = EvaluateOutcome(10, accuracy, 1 - accuracy, 1.0, MemoryReport(1, 1, 1))
        with world.stores.storage.transaction() as connection:
            evaluation.store_evaluation(connection, waiting, outcome, now_s=world.clock.now_s)
        rounds.append(waiting.round)
    return rounds


def train_round(world: World, devices: list[FakeDevice]) -> None:
    """One round of training with a head over blocks."""
    world.play()
    for device in devices:
        task = device.task()
        if task is not None:
            assert device.deliver(trained(device, task)).json() == {"status": "counted"}
    world.play()


def test_it_stops_after_so_many_evaluations_and_the_best_values_stand(world: World, evaluated) -> None:
    """Two evaluations without a better one end the run at the values of the best, and the reason names them."""
    devices = world.fleet("a", "b")
    world.create_run(**evaluated, rounds=9, patience=2)
    world.play()
    score(world, 0.1)
    best = b""
    for accuracy in (0.3, 0.5, 0.4, 0.5):
        world.work(devices)
        score(world, accuracy)
        best = world.values() if (accuracy, best) == (0.5, b"") else best
    world.play()
    run = world.run()
    assert (run["state"], run["rounds_committed"]) == ("finished", 4)
    assert run["reason"] == (
        "2 evaluations without a better one: 50.0% at round 2, 50.0% at the last; the best values stand"
    )
    assert world.values() == best


def test_while_it_gains_it_goes_on(world: World, evaluated) -> None:
    """Every better evaluation begins the count anew."""
    devices = world.fleet("a", "b")
    world.create_run(**evaluated, rounds=4, patience=2)
    for accuracy in (0.1, 0.3, 0.2, 0.4):
        world.work(devices)
        score(world, accuracy)
    world.play()
    assert world.run()["reason"] == "all rounds committed"


def test_slices_that_add_nothing_to_a_visit_are_given_up(world: World, evaluated) -> None:
    """After a first visit its head is the score to beat; if slices do not, its values stand and the run says so."""
    devices = world.fleet("a", "b")
    world.create_run(**{**TRAINED, "rounds": 9}, **evaluated, visit="first_and_last", patience=2)
    world.play()
    score(world, 0.1)
    visit_round(world)
    score(world, 0.8)
    after_visit = world.values()
    world.play(2)
    for accuracy in (0.7, 0.8):
        train_round(world, devices)
        score(world, accuracy)
    world.play(2)
    run = world.run()
    assert run["state"] == "finished"
    assert run["reason"].startswith(
        "slices add nothing to the head in closed form: 80.0% after the visit, 80.0%"
    )
    assert world.values() == after_visit


def test_a_last_visit_begins_with_sums_of_its_own(world: World, evaluated) -> None:
    """If a first visit's head was worse than what was there, and nothing was trained, no device's rows count twice."""
    world.fleet("a", "b")
    world.create_run(**{**TRAINED, "rounds": 9}, **evaluated, visit="first_and_last", patience=1)
    world.play()
    score(world, 0.5)
    visit_round(world)
    score(world, 0.4)
    world.play(2)
    assert sorted(visit_round(world)) == ["a", "b"]
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    told = [event["message"] for event in events if event["code"] == "head_solved"]
    assert [message.split(",")[0] for message in told] == ["head in closed form of 12 rows"] * 2


def test_slices_that_did_add_are_visited_with_the_best_values(world: World, evaluated) -> None:
    """If slices were better than the visit's head for a while, the last visit is made with those values."""
    devices = world.fleet("a", "b")
    world.create_run(**{**TRAINED, "rounds": 9}, **evaluated, visit="first_and_last", patience=1)
    world.play()
    score(world, 0.1)
    visit_round(world)
    score(world, 0.5)
    world.play(2)
    train_round(world, devices)
    score(world, 0.6)
    best = world.values()
    train_round(world, devices)
    score(world, 0.4)
    world.play(2)
    assert world.values() == best
    assert sorted(visit_round(world)) == ["a", "b"]
    score(world, 0.7)
    world.play(2)
    assert world.run()["reason"] == "every device was asked once"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"patience": 2}, "add a table [evaluation]"),
        ({"patience": 2, "average_from_round": 0, "evaluation": {"data": "x"}}, "leave one out"),
        ({"patience": -1}, "patience"),
    ],
)
def test_patience_that_cannot_be_is_refused(world: World, changed: dict[str, Any], says: str) -> None:
    """Patience without evaluations, or with a mean over rounds, is refused by name."""
    answer = world.admin("POST", "/v1/admin/runs", world.config(**changed))
    assert answer.status_code in (400, 422)
    assert says in answer.json()["message"]
