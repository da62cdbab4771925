"""What operators see of a run."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from rich.console import Console

from coordinator.admin.report import (
    COLUMNS,
    OF_EVALUATIONS,
    columns,
    line,
    row,
    text_table,
    write_report,
)
from coordinator.admin.watch import awaits_evaluation, table
from coordinator.config import EvaluationConfig
from coordinator.rounds.summary import EventSummary, RunSummary
from edge_runtime.figures import size
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
    assert all(column in shown for column in set(COLUMNS) - OF_EVALUATIONS)
    assert not any(column in shown for column in OF_EVALUATIONS)
    assert "1 of 2 rounds" in shown


def test_what_was_not_measured_leaves_no_dash(world: World, tmp_path: Path) -> None:
    """Rounds without evaluation, time or peaks have empty cells in watch, show and report; times are told in words."""
    devices = world.fleet("a", "b")
    world.create_run()
    world.work(devices)
    run = msgspec.convert(world.run(), RunSummary)
    evaluation = EvaluationConfig(data="dev.jsonl", every_rounds=2)
    config = msgspec.structs.replace(run.config, evaluation=evaluation)
    first = msgspec.structs.replace(run.rounds[0], seconds=194.0, loss=None)
    nothing = msgspec.structs.replace(
        first,
        round=1,
        state="abandoned",
        seconds=None,
        bytes_up_per_task=None,
        predicted_peak_bytes=None,
        measured_peak_bytes=None,
    )
    run = msgspec.structs.replace(run, config=config, rounds=[first, nothing])
    event = EventSummary(1, 0.0, 1, None, None, "round_abandoned", "the deadline passed")
    write_report(run, [event], tmp_path)
    report = (tmp_path / "report.txt").read_text()
    lines = [line(run, columns(run)), *(line(run, row(run, entry)) for entry in run.rounds)]
    for text in ("\n".join(lines), text_table(run), report):
        assert "3 min 14 s" in text
        assert not re.search(r"(^|\s)-(\s|$)", text)
    assert lines[2].split() == [
        "1",
        "abandoned",
        *size(first.bytes_up).split(),
        *size(first.bytes_down).split(),
    ]
    assert "  round 1  round_abandoned: the deadline passed\n" in report


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
