"""The demo's closing report: the run's page with comparisons on top, figures for programs, a text for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.admin.page import Additions, largest, last_score, run_page
from coordinator.admin.report import read_report
from coordinator.rounds.summary import RunSummary
from edge_runtime.figures import duration, size
from edge_runtime.html.line_chart import Line

if TYPE_CHECKING:
    from examples.banking77.compare import Agreement

#: A gain below this many points is noise as much as gain, and a share of it says nothing.
LEAST_GAIN = 0.05
#: Arms of the stored reference, and what their curves are called.
ARMS = (("backpropagation", "backpropagation"), ("head_only", "the head alone"))


def write_page(output: Path, reference: dict[str, Any] | None, agreement: Agreement, seconds: float) -> str:
    """Write report.json and report.html into ``output``; returns the text for the terminal.

    Args:
        output: folder of the demo; its ``run/`` holds the coordinator's own report.
        reference: stored accuracies of the other arms; None if they do not apply to these settings. A run that
            stopped before their last round is not compared with them.
        agreement: how the peft adapter agrees with the runtime.
        seconds: time the demo has taken so far, set-up not counted.
    """
    found = read_report(output / "run")
    run, visit = found.run, read_report(output / "visit").run
    report: dict[str, Any] = {
        "one_visit_accuracy": last_score(visit),
        "one_visit_bytes_up": sum(entry.bytes_up for entry in visit.rounds),
        "accuracy": _standing(run),
        "reference_accuracy": None,
        "head_only_accuracy": None,
        "gain_kept": None,
        "rounds": run.rounds_committed,
        "seconds": round(seconds, 1),
        "predicted_peak_bytes": largest([entry.predicted_peak_bytes for entry in run.rounds]),
        "measured_peak_bytes": largest([entry.measured_peak_bytes for entry in run.rounds]),
        "bytes_up": sum(entry.bytes_up for entry in run.rounds),
        "bytes_down": sum(entry.bytes_down for entry in run.rounds),
        "peft_agreement": agreement.agreement,
        "peft_accuracy": agreement.peft_accuracy,
        "adapter": str(output / "adapter"),
    }
    if (
        reference is not None
        and run.rounds_committed >= reference["backpropagation"]["curve"][-1]["round"] + 1
    ):
        report.update(_compared(report["accuracy"], reference))
    comparisons = _comparisons(report)
    page = run_page(
        run,
        found.events,
        Additions(
            title="banking77 by forward mode",
            lead="A quantised all-MiniLM-L6-v2, fine-tuned by devices that never backpropagate.",
            comparisons=tuple(comparisons),
            lines=_lines(reference),
        ),
    )
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "report.html").write_text(page, encoding="utf-8")
    return _text(report, comparisons, output)


def _standing(run: RunSummary) -> float | None:
    """Accuracy of the values that stand: the best evaluation's if patience ended the run, else the last one's."""
    scores = [entry.accuracy for entry in run.counting if entry.accuracy is not None]
    patience = run.config.patience
    if patience and scores and len(scores) - 1 - scores.index(max(scores)) >= patience:
        return max(scores)
    return last_score(run)


def _lines(reference: dict[str, Any] | None) -> tuple[Line, ...]:
    """Curves of the stored arms."""
    if reference is None:
        return ()
    return tuple(
        Line(name, tuple((float(point["round"] + 1), point["accuracy"]) for point in reference[arm]["curve"]))
        for arm, name in ARMS
    )


def _compared(accuracy: float, reference: dict[str, Any]) -> dict[str, Any]:
    backprop, head_only = reference["backpropagation"]["accuracy"], reference["head_only"]["accuracy"]
    gain = backprop - head_only
    return {
        "reference_accuracy": backprop,
        "head_only_accuracy": head_only,
        "backpropagation_gain": gain,
        "gain_kept": (accuracy - head_only) / gain if gain >= LEAST_GAIN else None,
        "reference_command": reference["command"],
    }


def _comparisons(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run's own page does not tell, as (name, value)."""
    lines = [
        (
            "one visit to each device first: a head over all blocks, without a gradient",
            f"{_percent(report['one_visit_accuracy'])}, {size(report['one_visit_bytes_up'])} up",
        ),
        ("forward mode, accuracy on 1,000 dev rows", f"{_percent(report['accuracy'])} (chance is 1.3 %)"),
        ("forward mode over one visit", _over_visit(report)),
    ]
    if report["reference_accuracy"] is not None:
        lines += [
            ("the head alone, same rounds, data and seeds", _percent(report["head_only_accuracy"])),
            ("backpropagation on the same slices", _percent(report["reference_accuracy"])),
            ("gain over the head alone", _gain(report)),
        ]
    return [
        *lines,
        ("time of the whole demo, export included", duration(report["seconds"])),
        (
            "peft adapter on the float model",
            f"{_percent(report['peft_accuracy'])}, agrees with the runtime on "
            f"{_percent(report['peft_agreement'])} of the rows",
        ),
        ("adapter", report["adapter"]),
    ]


def _over_visit(report: dict[str, Any]) -> str:
    """How far training ended from the visit, and which of the two to take on these data."""
    points = 100 * (report["accuracy"] - report["one_visit_accuracy"])
    advice = "training pays here" if points > 0 else "on these data take the visit, and train nothing"
    return f"{points:+.1f} points: {advice}"


def _gain(report: dict[str, Any]) -> str:
    """The gain beside backpropagation's, as a share of it where that is large enough to have shares."""
    own = 100 * (report["accuracy"] - report["head_only_accuracy"])
    other = 100 * report["backpropagation_gain"]
    text = f"{own:+.1f} points; backpropagation gains {other:+.1f} points"
    if report["gain_kept"] is None:
        return f"{text}, which is too small to tell a share of"
    return f"{text}, of which this is {100 * report['gain_kept']:.0f} %"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _text(report: dict[str, Any], comparisons: list[tuple[str, str]], output: Path) -> str:
    lines = [
        *comparisons,
        ("rounds", str(report["rounds"])),
        ("bytes up / down", f"{size(report['bytes_up'])} / {size(report['bytes_down'])}"),
        (
            "peak memory of a worker, predicted / measured",
            f"{size(report['predicted_peak_bytes'])} / {size(report['measured_peak_bytes'])}",
        ),
        ("page", str(output / "report.html")),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"   {name.ljust(width)}  {value}" for name, value in lines)
