"""Groups of rows that a daemon's run is evaluated on: who took part, and how robust the run is over both kinds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.admin.page import robustness_lines, run_page
from coordinator.admin.report import text_table
from coordinator.rounds import evaluation
from coordinator.rounds.robustness import WARNING
from coordinator.rounds.runs import find_run
from coordinator.rounds.summary import summarise
from edge_runtime.errors import WorkerError
from edge_runtime.protocol.messages import MemoryReport
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome
from tests.coordinator.conftest import ROW, World

#: Accuracy by file, before the run and after it.
ACCURACIES = {"dev": (0.5, 0.6), "home": (0.5, 0.6), "away": (0.4, 0.3)}


def start(world: World, rounds: int = 1) -> None:
    """A run of devices called home-1 and home-2, with rows of theirs and of others."""
    files = {name: world.folder / f"{name}.jsonl" for name in ACCURACIES}
    for path in files.values():
        path.write_text(ROW)
    groups = [
        {"name": "home", "data": str(files["home"]), "devices": ["home-*"]},
        {"name": "away", "data": str(files["away"]), "devices": ["away-*"]},
    ]
    world.create_run(rounds=rounds, evaluation={"data": str(files["dev"]), "groups": groups})


def evaluate_waiting(world: World, monkeypatch: pytest.MonkeyPatch, broken: str = "") -> None:
    """Make the evaluations that wait with a stand-in for the worker."""

    def finish(job: EvaluateJob, kind: object) -> EvaluateOutcome:
        name = Path(job.data_path).stem
        if name == broken:
            raise WorkerError("the worker was killed")
        accuracy = ACCURACIES[name][waiting.round >= 0]
        return EvaluateOutcome(10, accuracy, 0.5, 1.0, MemoryReport(1, 1, 1))

    monkeypatch.setattr(evaluation, "is_current", lambda *_: True)
    monkeypatch.setattr(evaluation, "start_worker", lambda job: job)
    monkeypatch.setattr(evaluation, "finish_worker", finish)
    while (waiting := evaluation.next_evaluation(world.stores)) is not None:
        outcome = asyncio.run(evaluation.evaluate(waiting))
        groups = asyncio.run(evaluation.evaluate_groups(waiting))
        with world.stores.storage.transaction() as connection:
            evaluation.store_evaluation(connection, waiting, outcome, groups, now_s=world.clock.now_s)


def test_the_summary_tells_robustness_and_that_it_is_a_stand_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group took part and gained a fifth, the other did not and lost a quarter; page and text carry the warning."""
    devices = world.fleet("home-1", "home-2")
    start(world)
    world.work(devices)
    assert world.run()["robustness"] is None
    evaluate_waiting(world, monkeypatch)
    found = world.run()["robustness"]
    assert (found["seen"], found["unseen"]) == (pytest.approx(0.2), pytest.approx(-0.25))
    assert found["crrm_standin"] == pytest.approx(-0.025)
    assert [(each["group"], each["took_part"], each["rows"]) for each in found["groups"]] == [
        ("away", False, 10),
        ("home", True, 10),
    ]
    run_id = world.run()["run_id"]
    with world.stores.storage.reading() as connection:
        run = summarise(connection, find_run(world.stores, connection, run_id))
    (line,) = robustness_lines(run)
    assert line.startswith("Relative change of accuracy over groups of devices: seen +20.0 %, unseen -25.0 %")
    assert line.endswith(WARNING)
    assert line in text_table(run)
    assert WARNING in run_page(run, [])


def test_a_group_that_cannot_be_evaluated_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation counts as failed, the run ends all the same, and no robustness is made up."""
    devices = world.fleet("home-1", "home-2")
    start(world)
    world.work(devices)
    evaluate_waiting(world, monkeypatch, broken="away")
    run = world.run()
    assert (run["state"], run["robustness"]) == ("finished", None)
    assert [entry["accuracy"] for entry in run["rounds"]] == [None]


def test_a_run_without_groups_has_no_such_figure(world: World) -> None:
    """Nothing is told of groups that nobody named."""
    world.fleet("home-1", "home-2")
    world.create_run(rounds=1)
    assert world.run()["robustness"] is None


def test_rows_that_are_not_there_are_refused_when_the_run_is_made(world: World) -> None:
    """A group's file that is missing, and a name that two groups have, are told before any device is asked."""
    data = world.folder / "dev.jsonl"
    data.write_text(ROW)
    nowhere = {"name": "away", "data": str(world.folder / "nowhere.jsonl")}
    twice = [{"name": "home", "data": str(data)}] * 2
    for groups, message in (
        ([nowhere], "evaluation.groups, away: data names"),
        (twice, "two groups named home"),
    ):
        run = world.config(evaluation={"data": str(data), "groups": groups})
        answer = world.admin("POST", "/v1/admin/runs", run)
        assert answer.status_code == 422, answer.text
        assert message in answer.text
    assert world.admin("GET", "/v1/admin/runs").json() == []
