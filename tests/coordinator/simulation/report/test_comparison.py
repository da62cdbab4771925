"""The comparison: figures, text table and page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from coordinator.cli import main
from coordinator.simulation.config import (
    ArmConfig,
    ComparisonConfig,
    DataConfig,
    FleetConfig,
    SimulationConfig,
)
from coordinator.simulation.cost import forward_passes_per_example
from coordinator.simulation.record import Point, Record, read_records, write_record
from coordinator.simulation.report.comparison import compare
from coordinator.simulation.report.page import comparison_page
from coordinator.simulation.report.table import text_table
from edge_runtime.protocol.messages import Directions, HeadUpdate, LocalOptimizer, Task
from tests.coordinator.simulation.conftest import Workshop
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.memory.test_plan import MODEL

NASTY = '<script>alert("x")</script> & <b>'


def record(arm: str, seed: int, scores: list[float], *, passes: int = 10, **changed: object) -> Record:
    """A finished arm whose accuracy goes through ``scores``."""
    points = tuple(
        Point(index - 1, value, 1.0, None, index * passes, index * 1000, 0, float(index), 0.1)
        for index, value in enumerate(scores)
    )
    made = Record(
        arm, "kind", seed, "finished", None, "", "classification", "p", "f", 1, len(scores) - 1,
        2 * (len(scores) - 1), 0, "s", "v", points, None,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changed)


def config(*arms: str, kind: str = "kind", name: str = "sim") -> SimulationConfig:
    """A configuration with these arms, the first two being head only and reference."""
    return SimulationConfig(
        name,
        (0, 1),
        FleetConfig(2, 1),
        DataConfig("t", "d", "iid"),
        tuple(ArmConfig(arm, "p", kind) for arm in arms),
        comparison=ComparisonConfig(arms[0], arms[1]),
    )


RECORDS = [
    record("head", 0, [0.5, 0.6, 0.6]),
    record("head", 1, [0.5, 0.7, 0.6]),
    record("exact", 0, [0.5, 0.7, 0.8], passes=40),
    record("exact", 1, [0.5, 0.9, 0.8], passes=40),
    record("ours", 0, [0.5, 0.7, 0.7], passes=20),
    record("ours", 1, [0.5, 0.7, 0.8], passes=20),
    record("wild", 0, [0.5], status="diverged", round=3, reason=NASTY),
]


def test_gains_are_shares_of_the_reference_arm() -> None:
    """An arm's kept gain is its gain over head only, over the reference's; passes to the best are counted."""
    found = compare(config("head", "exact", "ours", "wild"), RECORDS)
    head, exact, ours, wild = found.arms
    assert found.denominator == pytest.approx(0.2)
    assert (ours.final, ours.low, ours.high) == (pytest.approx(0.75), 0.7, 0.8)
    assert ours.gain == pytest.approx(0.15)
    assert ours.kept == pytest.approx(0.75)
    assert (head.kept, exact.kept) == (pytest.approx(0), pytest.approx(1))
    assert (ours.passes, ours.passes_to_best) == (40, 30)
    assert ours.bytes_up_per_task == 500
    assert (wild.status, wild.gain) == ("seed 0 diverged at round 3", None)
    assert head.status == "finished"


def test_a_reference_that_gained_nothing_leaves_no_share() -> None:
    """Without a gain of the reference arm nothing is divided by it, and the table says so."""
    records = [record("head", 0, [0.5, 0.6]), record("exact", 0, [0.5, 0.6])]
    found = compare(config("head", "exact"), records)
    assert [arm.kept for arm in found.arms] == [None, None]
    assert "gained nothing" in text_table(found)


def test_perplexity_is_better_when_lower() -> None:
    """For language modelling scores are perplexities, and a gain is how far they fell."""

    def lm(arm: str, values: list[float]) -> Record:
        made = record(arm, 0, values, task="causal_lm")
        points = tuple(msgspec.structs.replace(p, perplexity=p.accuracy, accuracy=0.1) for p in made.points)
        return msgspec.structs.replace(made, points=points)

    found = compare(config("head", "exact"), [lm("head", [9.0, 8.0, 8.5]), lm("exact", [9.0, 7.0, 6.5])])
    assert found.measure == "perplexity"
    assert (found.arms[0].best, found.arms[1].gain) == (8.0, 2.0)
    assert "final perplexity" in text_table(found)


def test_the_table_is_aligned_text() -> None:
    """Every arm is a line, columns start at one place, and the denominator is told below."""
    lines = text_table(compare(config("head", "exact", "ours", "wild"), RECORDS)).splitlines()
    assert lines[0].split()[:3] == ["arm", "kind", "seeds"]
    assert [line.split()[0] for line in lines[1:5]] == ["head", "exact", "ours", "wild"]
    assert "75 %" in lines[3]
    assert "seed 0 diverged at round 3" in lines[4]
    assert lines[-1] == "Gains are over head; the denominator is the gain of exact: +20.0 pt."


class Reader(HTMLParser):
    """Collects tags and checks that they are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line", "polyline", "polygon", "circle", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "polygon", "circle"):
            assert self.open.pop() == tag


def test_the_page_has_curves_and_escapes_names() -> None:
    """Three drawings in two widths with a line for each arm; hostile names stay text; nothing is fetched."""
    page = comparison_page(
        compare(config("head", "exact", "ours", "wild", kind=NASTY, name="n" + NASTY[:30]), RECORDS)
    )
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert reader.addresses == []
    assert "url(http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("<polyline") == 3 * 2 * 4
    assert page.count("<polygon") >= 3 * 2 * 3
    assert "&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page
    for title in ("against rounds", "against forward passes", "against MiB up"):
        assert title in page


def test_a_page_without_any_measure_says_so() -> None:
    """Before anything was evaluated there are no curves, and the page still stands."""
    page = comparison_page(compare(config("head", "exact"), []))
    assert "No arm has been evaluated yet" in page


def test_records_come_back_as_written(tmp_path: Path) -> None:
    """Records are read in the order of arms and seeds, equal to what was written."""
    for each in reversed(RECORDS):
        write_record(tmp_path, each)
    assert read_records(tmp_path) == sorted(RECORDS, key=lambda r: (r.arm, r.seed))


def test_the_command_prints_the_table_and_writes_the_page(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """A simulation ends with both files; ``--page`` makes them again from the records alone."""
    arms = [{"name": "a", "package": "bigram"}, {"name": "b", "package": "bigram", "run": {"draws": 3}}]
    path, out = workshop.write(arms=arms), workshop.folder / "out"
    assert main(["simulate", str(path), "--output", str(out), "--arms", "a", "--threads", "1"]) == 0
    assert "a-seed0: finished" in capsys.readouterr().out
    more = ["--arms", "b", "--seeds", "0", "--threads", "1"]
    assert main(["simulate", str(path), "--output", str(out), *more]) == 0
    text, page = (out / "comparison.txt").read_text(), (out / "comparison.html").read_text()
    assert re.search(r"^a .*\n^b .*finished", text, re.MULTILINE)
    assert capsys.readouterr().out.endswith("\n" + text)
    (out / "comparison.html").unlink()
    assert main(["simulate", str(path), "--output", str(out), "--page"]) == 0
    assert (out / "comparison.html").read_text() == page


def test_a_failed_arm_tells_by_the_exit_code(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """When an arm failed the command ends with code 1 and one line, after table and page were written."""
    path, out = workshop.write(run={"deadline_s": 0.1}), workshop.folder / "out"
    assert main(["simulate", str(path), "--output", str(out), "--threads", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of 1 arms failed; the first: ours, seed 0: CoordinatorError: ")
    assert error.count("\n") == 1
    assert "failed" in (out / "comparison.txt").read_text()


@pytest.mark.parametrize(
    ("update", "draws", "slices", "passes"),
    [
        ("forward", 1, ("s0",), 2),
        ("forward", 4, ("s0",), 5),
        ("backprop", 1, ("s0",), 4),
        ("forward", 4, (), 1),
    ],
)
def test_forward_passes_are_counted_by_what_is_done(
    update: str, draws: int, slices: tuple[str, ...], passes: int
) -> None:
    """Forward mode costs one pass and one for each draw, backpropagation four, the head alone one."""
    task = Task(
        task_id="t",
        run_id="r",
        round=0,
        slot=0,
        seed=0,
        package="0" * 64,
        package_signature="A" * 86 + "==",
        state="0" * 64,
        slices=slices,
        train_head=True,
        steps=1,
        batch_size=1,
        draws=draws,
        sequence_limit=8,
        optimizer=LocalOptimizer(),
        required_bytes=0,
        deadline_s=1.0,
        update=update,
    )
    assert forward_passes_per_example(task, MODEL) == passes


@pytest.mark.parametrize("directions", ["one_slice", "dealt"])
@pytest.mark.parametrize(
    ("slices", "head", "passes"),
    [
        (("s0", "s1", "s2", "s3"), "exact", 1 + 8 * (1 + 2 + 3 + 4) / 16),
        (("s2", "s3"), "exact", 1 + 8 * 3 / 4),
        (("s3",), "exact", 1 + 8),
        (("s2", "s3"), "perturbed", 1 + 8 * (1 + 2) / 6),
    ],
)
def test_a_draw_of_one_slice_is_counted_from_that_slice_on(
    directions: Directions, slices: tuple[str, ...], head: HeadUpdate, passes: float
) -> None:
    """Of four blocks with a slice each, a draw passes those from its slice on; one that moves the head alone none."""
    task = msgspec.structs.replace(
        TASK, slices=slices, draws=8, directions=directions, head=head, train_head=True
    )
    assert forward_passes_per_example(task, MODEL) == pytest.approx(passes)
