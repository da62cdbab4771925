"""What operators see of a run."""

from __future__ import annotations

import msgspec
from rich.console import Console

from coordinator.admin.report import COLUMNS
from coordinator.admin.watch import awaits_evaluation, table
from coordinator.config import EvaluationConfig
from coordinator.rounds.summary import RunSummary
from tests.coordinator.conftest import World


def test_table_of_rounds(world: World) -> None:
    """The live table has a row for each round and the columns operators asked for."""
    devices = world.fleet("a", "b")
    world.create_run()
    world.work(devices)
    run = msgspec.convert(world.run(), RunSummary)
    console = Console(record=True, width=160)
    with console.capture() as capture:
        console.print(table(run, rows=10))
    shown = capture.get()
    assert all(column in shown for column in COLUMNS)
    assert "1 of 2 rounds" in shown


def test_a_round_that_will_be_evaluated_is_shown_with_its_accuracy(world: World) -> None:
    """The plain list holds back exactly the committed rounds whose evaluation is due and not yet there."""
    devices = world.fleet("a", "b")
    world.create_run()
    world.work(devices)
    world.work(devices)
    run = msgspec.convert(world.run(), RunSummary)
    evaluation = EvaluationConfig(data="dev.jsonl", every_rounds=2)
    due = msgspec.structs.replace(run, config=msgspec.structs.replace(run.config, evaluation=evaluation))
    assert [awaits_evaluation(due, index) for index in range(2)] == [False, True]
    last = msgspec.structs.replace(due.rounds[1], accuracy=0.5)
    there = msgspec.structs.replace(due, rounds=[due.rounds[0], last])
    assert not awaits_evaluation(there, 1)
