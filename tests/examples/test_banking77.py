"""The banking77 demonstration's page, from a run's report and stored arms."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.admin.report import write_report
from examples.banking77.page import write_page
from tests.coordinator.admin.test_page import FINISHED
from tests.edge_runtime.html.pages import assert_stands_alone, assert_well_formed, text_of

AGREEMENT: Any = SimpleNamespace(agreement=0.991, peft_accuracy=0.887)


def reference(backpropagation: float, head_only: float) -> dict[str, Any]:
    """Stored arms that ended at these accuracies."""
    arms = {"backpropagation": backpropagation, "head_only": head_only}
    curves = {
        name: {"accuracy": end, "curve": [{"round": 3, "accuracy": 0.5}, {"round": 7, "accuracy": end}]}
        for name, end in arms.items()
    }
    return {**curves, "command": "make demo-reference"}


@pytest.fixture
def written(tmp_path: Path):
    """Write the demo's page beside a finished run's report: its text, its page and its figures."""

    def write(stored: dict[str, Any] | None) -> tuple[str, str, dict[str, Any]]:
        write_report(FINISHED, [], tmp_path / "run")
        write_report(FINISHED, [], tmp_path / "visit")
        shown = write_page(tmp_path, stored, AGREEMENT, 644.0)
        page = (tmp_path / "report.html").read_text()
        return shown, page, json.loads((tmp_path / "report.json").read_text())

    return write


def test_a_small_gain_is_told_no_share_of(written) -> None:
    """Where backpropagation gains less than five points over the head alone, no share of it is told anywhere."""
    shown, page, figures = written(reference(0.882, 0.866))
    for text in (shown, text_of(page)):
        assert "+2.7 points; backpropagation gains +1.6 points, which is too small to tell a share of" in text
        assert "169" not in text
    assert figures["gain_kept"] is None


def test_the_page_says_whether_training_paid(tmp_path: Path) -> None:
    """Where training ends no higher than one visit, the page says so, and that the visit is what to take."""
    write_report(FINISHED, [], tmp_path / "visit")
    for accuracy, said in (
        (0.85, "-4.3 points: on these data take the visit"),
        (0.95, "+5.7 points: training pays"),
    ):
        last = replace(FINISHED.rounds[-1], accuracy=accuracy)
        write_report(replace(FINISHED, rounds=[*FINISHED.rounds[:-1], last]), [], tmp_path / "run")
        assert said in write_page(tmp_path, None, AGREEMENT, 644.0)


def test_a_run_that_patience_ended_is_worth_its_best_evaluation(tmp_path: Path) -> None:
    """The best values stand, so the page tells their accuracy and not that of the last evaluation."""
    config = replace(FINISHED.config, patience=1)
    rounds = [
        replace(entry, accuracy={3: 0.9, 7: 0.8}.get(number)) for number, entry in enumerate(FINISHED.rounds)
    ]
    write_report(replace(FINISHED, config=config, rounds=rounds), [], tmp_path / "run")
    write_report(FINISHED, [], tmp_path / "visit")
    write_page(tmp_path, None, AGREEMENT, 644.0)
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] == 0.9


def test_a_run_that_stopped_early_is_not_compared(written) -> None:
    """Stored arms played all their rounds; beside a run that stopped before, their ends say nothing."""
    longer = reference(0.882, 0.866)
    longer["backpropagation"]["curve"].append({"round": 999, "accuracy": 0.882})
    shown, _, figures = written(longer)
    assert figures["gain_kept"] is None and figures["reference_accuracy"] is None
    assert "the head alone" not in shown


def test_a_large_gain_is_told_with_its_share(written) -> None:
    """From five points on, the share of backpropagation's gain is told."""
    shown, page, figures = written(reference(0.96, 0.86))
    for text in (shown, text_of(page)):
        assert "+3.3 points; backpropagation gains +10.0 points, of which this is 33 %" in text
    assert figures["gain_kept"] == pytest.approx(0.33)


def test_the_page_is_the_runs_own_with_comparisons(written) -> None:
    """The page stands alone, has the stored arms' curves, and tells time and sizes in words."""
    shown, page, figures = written(reference(0.882, 0.866))
    assert_stands_alone(page)
    assert_well_formed(page)
    text = text_of(page)
    for expected in (
        "banking77 by forward mode",
        "Accuracy rose from 1.5 % to 89.3 %",
        "10 min 44 s",
        "the head alone",
        "one visit to each device first: a head over all blocks, without a gradient",
    ):
        assert expected in text
    assert "backpropagation: 50 % at 4, 88.2 % at 8" in page
    assert "4.58 MiB / 208.0 MiB" in shown
    assert figures["seconds"] == 644.0


def test_without_stored_arms_nothing_is_compared(written) -> None:
    """Settings that the reference was not made for leave the arms out of page and figures."""
    shown, page, figures = written(None)
    assert "backpropagation on the same slices" not in shown + text_of(page)
    assert figures["reference_accuracy"] is None
