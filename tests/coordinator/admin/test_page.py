"""A run's page: of a finished run, of one that went badly, and of one with nothing to tell yet."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from coordinator.admin.page import MOST_ROUNDS, Additions, run_page
from coordinator.admin.report import read_report, write_report
from coordinator.config import EvaluationConfig, RunConfig, run_config
from coordinator.rounds.summary import EventSummary, RoundSummary, RunSummary
from edge_runtime.html.line_chart import Line
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import RUN, World
from tests.edge_runtime.html.pages import (
    Layout,
    Reader,
    assert_stands_alone,
    assert_well_formed,
    lay_out,
    needs_browser,
    text_of,
)

MIB = 1 << 20
CONFIG: RunConfig = run_config({**RUN, "package": "p", "publisher_key": generate_key().public_key})


def round_of(number: int, accuracy: float | None = None) -> RoundSummary:
    """A committed round of five devices."""
    return RoundSummary(
        round=number,
        state="committed",
        reason="",
        accuracy=accuracy,
        loss=None if accuracy is None else 2 - accuracy,
        train_loss=2.5 / (number + 1),
        bytes_up=600_000,
        bytes_down=26 * MIB,
        seconds=194.2,
        predicted_peak_bytes=102 * MIB,
        measured_peak_bytes=103 * MIB + number,
        devices=[f"device-{index:02}" for index in range(5)],
        results=5,
        refused=0,
        failed=0,
        examples=640,
        caps_bytes=[128 * MIB],
    )


FINISHED = RunSummary(
    run_id="tiny-5bf48d",
    name="tiny",
    state="finished",
    reason="all rounds committed",
    rounds_committed=8,
    rounds_wanted=8,
    initial_accuracy=0.015,
    initial_loss=4.344,
    created_s=1_700_000_000.0,
    started_s=1_700_000_001.0,
    finished_s=1_700_000_195.0,
    package_sha256="067b1a27" * 8,
    values_sha256="138f89c8" * 8,
    config=replace(CONFIG, evaluation=EvaluationConfig(data="dev.jsonl", every_rounds=4)),
    rounds=[round_of(number, {3: 0.574, 7: 0.893}.get(number)) for number in range(8)],
    package_name="tiny",
    engines=["onnxruntime"],
    runtime_versions=["0.1.0"],
)
BAD = replace(
    FINISHED,
    state="failed",
    reason="3 rounds in a row were abandoned",
    rounds_committed=1,
    rounds=[
        replace(round_of(0), gated=True, caps_bytes=[64 * MIB, 256 * MIB], refused=2, failed=1),
        replace(
            round_of(1),
            state="abandoned",
            reason="too few results",
            train_loss=None,
            predicted_peak_bytes=None,
            measured_peak_bytes=None,
            devices=[],
        ),
    ],
)
EVENTS = [
    EventSummary(1, 0.0, None, "a", None, "enrolled", "class generic"),
    EventSummary(2, 1.0, 0, "a", "t1", "task_refused", "cap: the task needs a cap of 96 MiB"),
    EventSummary(3, 1.0, 0, "b", "t2", "task_refused", "cap: the task needs a cap of 97 MiB"),
    EventSummary(4, 2.0, 1, "c", "t3", "device_late", "place 1 goes to another device"),
    EventSummary(5, 3.0, None, "d", None, "cap_too_small", "needs 96 MiB, the cap is 32.0 MiB"),
]
QUEUED = replace(
    FINISHED,
    state="queued",
    reason="",
    rounds=[],
    rounds_committed=0,
    started_s=None,
    finished_s=None,
    initial_accuracy=None,
    initial_loss=None,
    runtime_versions=[],
)
STORIES = replace(
    FINISHED,
    task="causal_lm",
    initial_perplexity=45.125,
    rounds=[replace(entry, perplexity=12.5 + entry.round) for entry in FINISHED.rounds],
)
LONG = replace(
    FINISHED,
    rounds_committed=1000,
    rounds=[
        replace(round_of(number, 0.5), devices=[f"device-{number:04}-{'x' * 40}"]) for number in range(1000)
    ],
)
ADDITIONS = Additions(
    "a demo", "One sentence.", (("the head alone", "86.6 %"),), (Line("other", ((0, 0.2), (8, 0.5))),)
)
CASES = {
    "finished": run_page(FINISHED, []),
    "bad": run_page(BAD, EVENTS),
    "queued": run_page(QUEUED, []),
    "stories": run_page(STORIES, []),
    "long": run_page(LONG, []),
    "with additions": run_page(FINISHED, [], ADDITIONS),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_the_page_stands_alone(case: str) -> None:
    """Every page is one small well-formed file that loads nothing, and nothing on it is told by a dash."""
    page = CASES[case]
    assert_stands_alone(page)
    assert_well_formed(page)
    assert not re.search(r">\s*[-–]\s*<", page)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, int], Layout], list[str]]:
    """Every page on a telephone and on a desk, and what the browser complained about, from one browser."""
    return lay_out(tmp_path_factory.mktemp("shown"), CASES, (360, 1200))


@needs_browser
@each_case
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_cut_off(
    case: str, width: int, shown: tuple[dict[tuple[str, int], Layout], list[str]]
) -> None:
    """Neither on a telephone nor on a desk is a table cut or the page scrolled sideways, and Chromium is content."""
    layouts, console = shown
    assert console == []
    assert layouts[case, width].width <= width
    assert layouts[case, width].outside == []


def test_a_finished_run_is_told_in_words() -> None:
    """The page has result, time, traffic, memory beside its prediction and cap, devices, versions and the digest."""
    text = text_of(CASES["finished"])
    for expected in (
        "✓ Finished",
        "Accuracy rose from 1.5 % to 89.3 % in 8 rounds",
        "All rounds committed. It took 3 min 14 s.",
        "Workers took at most 103.0 MiB; 102.0 MiB were predicted at most, 1.0 % below.",
        "The cap is 128.0 MiB, 20 % of it left free.",
        "4.58 MiB",
        "208.0 MiB",
        "None: no device refused or failed a task",
        "Who took part: 5 devices",
        "values are evaluated after every 4 committed ones",
        "edge-runtime 0.1.0",
        "ONNX Runtime",
        "tiny, sha256 067b1a27067b",
    ):
        assert expected in text
    assert FINISHED.package_sha256 not in text


def test_a_bad_run_is_told_by_reason() -> None:
    """What devices refused or failed stands by reason, with who and why; an abandoned round says why too."""
    page = CASES["bad"]
    text = text_of(page)
    rows = re.findall(
        r'<tr class=""><th scope="row">([^<]*)</th><td class="n" data-name="times">(\d+)</td>', page
    )
    assert rows == [
        ("refused the task", "2"),
        ("did not deliver in time", "1"),
        ("has a cap that is too small for any task of this run", "1"),
    ]
    for expected in (
        "✕ Failed",
        "1 of 8 rounds committed, without an evaluation",
        "a, b",
        "cap: the task needs a cap of 97 MiB",
        "1, abandoned: too few results",
        "0, left the values as they were",
        "The devices' caps are 64.0 MiB to 256.0 MiB.",
    ):
        assert expected in text
    assert "enrolled" not in text


def test_columns_of_what_was_not_measured_are_left_out() -> None:
    """Without an evaluation there is no column of accuracy or loss, and a run that has not begun says so in words."""
    assert 'data-name="accuracy"' not in CASES["bad"]
    assert 'data-name="loss"' not in CASES["bad"]
    assert 'data-name="training loss"' in CASES["bad"]
    assert "there is no curve" in CASES["bad"]
    assert "there is no curve" not in CASES["finished"]
    text = text_of(CASES["queued"])
    for expected in ("No round was opened.", "there is no curve", "Memory: not measured"):
        assert expected in text
    assert "It took" not in text


def test_a_language_model_is_judged_by_perplexity() -> None:
    """Perplexity stands where classification has accuracy, in the sentence, the curve and the table."""
    page = CASES["stories"]
    assert "Perplexity fell from 45.125 to 19.500 in 8 rounds" in text_of(page)
    assert "perplexity over committed rounds" in page
    assert 'data-name="accuracy"' not in page


def test_a_long_run_shows_its_last_rounds() -> None:
    """The page of a thousand rounds tells how many it leaves out."""
    text = text_of(CASES["long"])
    assert f"The last {MOST_ROUNDS} of 1,000; report.txt has all." in text
    assert "the first 100, report.json has all" in text


def test_additions_stand_on_top_of_the_same_page() -> None:
    """An example's page is the run's page with a title, a table and curves more, and nothing less."""
    text = text_of(CASES["with additions"])
    for expected in ("a demo: run tiny-5bf48d", "One sentence.", "the head alone", "86.6 %", "other"):
        assert expected in text
    plain = set(text_of(CASES["finished"]).split("\n"))
    assert plain - set(text.split("\n")) <= {
        line for line in plain if "tiny-5bf48d" in line or "this run" in line
    }


def test_no_text_of_a_run_becomes_part_of_the_page() -> None:
    """Names, reasons and messages are escaped."""
    hostile = '"><script>alert(1)</script>'
    run = replace(
        BAD,
        run_id=hostile,
        name=hostile,
        reason=hostile,
        package_name=hostile,
        runtime_versions=[hostile],
        engines=[hostile],
        rounds=[replace(BAD.rounds[1], reason=hostile, devices=[hostile])],
    )
    events = [EventSummary(1, 0.0, 0, hostile, hostile, hostile, hostile)]
    page = run_page(
        run, events, Additions(hostile, hostile, ((hostile, hostile),), (Line(hostile, ((0, 1),)),))
    )
    assert "<script" not in page
    assert "script" not in {tag for tag, _ in Reader(page).tags}


def test_a_report_is_written_and_read_back(world: World, tmp_path: Path) -> None:
    """A real run's report has a page beside the others, with caps and versions; report.json gives the run back."""
    devices = world.fleet("a", "b")
    world.create_run()
    world.work(devices)
    run = msgspec.convert(world.run(), RunSummary)
    assert run.rounds[0].caps_bytes == [1 << 30]
    assert (run.package_name, run.engines, run.runtime_versions) == ("tiny", ["onnxruntime"], ["test"])
    write_report(run, EVENTS, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "curve.svg",
        "report.html",
        "report.json",
        "report.txt",
    ]
    assert read_report(tmp_path / "report").run == run
    assert read_report(tmp_path / "report").events == EVENTS
    page = (tmp_path / "report" / "report.html").read_text()
    assert_stands_alone(page)
    assert "… Running" in page
    assert "edge-runtime test" in text_of(page)
