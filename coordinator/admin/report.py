"""A run's report: report.html and report.txt for people, report.json for programs, curve.svg for other pages."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from coordinator.admin.page import robustness_lines, run_page
from coordinator.rounds.summary import DeviceSummary, EventSummary, RoundSummary, RunSummary
from edge_runtime.durable import write_durably
from edge_runtime.figures import duration, size
from edge_runtime.package.manifest import TaskKind

#: Columns of a table of rounds, with the least width of each; those of evaluations are left out where there are none.
COLUMNS = {
    "round": 5,
    "accuracy": 8,
    "loss": 6,
    "up": 10,
    "up a task": 10,
    "down": 10,
    "time": 10,
    "peak predicted": 14,
    "peak measured": 13,
}
OF_EVALUATIONS = frozenset({"accuracy", "loss"})
#: Events of no round that a report lists.
OF_A_DEVICE = frozenset({"cap_too_small", "device_set_aside", "device_resumed", "run_rolled_back"})
#: What a run is judged by, where it is not accuracy.
JUDGED_BY: dict[TaskKind, str] = {"causal_lm": "perplexity"}


def columns(run: RunSummary) -> tuple[str, ...]:
    """Names of a run's columns: perplexity stands for language models where classification has accuracy."""
    evaluated = run.config.evaluation is not None or run.initial_loss is not None
    names = (name for name in COLUMNS if evaluated or name not in OF_EVALUATIONS)
    return tuple(JUDGED_BY.get(run.task, name) if name == "accuracy" else name for name in names)


def row(run: RunSummary, entry: RoundSummary) -> tuple[str, ...]:
    """One round as texts, in the order of :func:`columns`; empty where nothing was measured."""
    texts = {
        "round": f"{entry.round}{_standing(entry)}",
        "accuracy": _score(run.task, entry.accuracy, entry.perplexity),
        "loss": "" if entry.loss is None else f"{entry.loss:.4f}",
        "up": size(entry.bytes_up),
        "up a task": _size(entry.bytes_up_per_task),
        "down": size(entry.bytes_down),
        "time": "" if entry.seconds is None else duration(entry.seconds),
        "peak predicted": _size(entry.predicted_peak_bytes),
        "peak measured": _size(entry.measured_peak_bytes),
    }
    names = {JUDGED_BY.get(run.task, name) if name == "accuracy" else name: name for name in COLUMNS}
    return tuple(texts[names[name]] for name in columns(run))


def _standing(entry: RoundSummary) -> str:
    """What is to be said of a round beside its number; nothing of one that was committed and counts."""
    if entry.rolled_back:
        return " rolled back"
    return " gated" if entry.gated else "" if entry.state == "committed" else f" {entry.state}"


def line(run: RunSummary, cells: tuple[str, ...]) -> str:
    """A line of a table whose rows come one by one: columns as wide as usual figures are."""
    widths = (COLUMNS.get(name, COLUMNS["accuracy"]) for name in columns(run))
    wide = (
        cell.rjust(max(width, len(name)))
        for cell, width, name in zip(cells, widths, columns(run), strict=True)
    )
    return "  ".join(wide).rstrip()


def headline(run: RunSummary) -> str:
    """The run in one line."""
    first = _score(run.task, run.initial_accuracy, run.initial_perplexity)
    start = first and f", from {first}{' perplexity' * (run.task == 'causal_lm')}"
    reason = f" ({run.reason})" if run.reason else ""
    spent = f", {privacy_line(run)}" if run.privacy is not None else ""
    return f"{run.run_id}: {run.state}{reason}, {run.rounds_committed} of {run.rounds_wanted} rounds{start}{spent}"


def privacy_line(run: RunSummary) -> str:
    """What a run with privacy has given away; empty without."""
    if run.privacy is None or run.config.privacy is None:
        return ""
    end = run.privacy.epsilon_at_end
    most = "" if end is None else f", at most {end:.3g} at the end"
    return (
        f"epsilon {run.privacy.epsilon:.3g} so far{most} (delta {run.config.privacy.delta:g}, for each "
        f"{run.config.privacy.unit}, noise by the {run.config.privacy.where})"
    )


def _score(task: TaskKind, accuracy: float | None, perplexity: float | None) -> str:
    """What a model is judged by, as a text; empty if it was not measured."""
    if task == "causal_lm":
        return "" if perplexity is None else f"{perplexity:.3f}"
    return "" if accuracy is None else f"{100 * accuracy:.1f} %"


def _size(count: float | None) -> str:
    return "" if count is None else size(count)


def text_table(run: RunSummary) -> str:
    """All rounds of a run as aligned plain text."""
    rows = [columns(run), *(row(run, entry) for entry in run.rounds)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    return "\n".join([*lines, *robustness_lines(run)])


class Report(Struct, frozen=True):
    """What report.json holds.

    Attributes:
        run: the run with its rounds.
        events: its events, oldest first.
    """

    run: RunSummary
    events: list[EventSummary]


def read_report(folder: Path) -> Report:
    """The report that :func:`write_report` left in a folder.

    Raises:
        OSError: it cannot be read.
    """
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=Report)


def set_aside_lines(run: RunSummary) -> list[str]:
    """The devices that a run asks no more, a line each, below a line that says so; nothing if there are none."""
    if not run.set_aside:
        return []
    lines = [f"  {entry.device}: {entry.reason}" for entry in run.set_aside]
    return ["set aside, until set up anew or resumed:", *lines]


def not_eligible_lines(run: RunSummary) -> list[str]:
    """How many devices may not work now, by reason; nothing if all may."""
    if not run.not_eligible:
        return []
    return [
        "not eligible now: " + ", ".join(f"{count} {reason}" for reason, count in run.not_eligible.items())
    ]


def device_table(devices: list[DeviceSummary], now_s: float) -> str:
    """Devices as aligned plain text; the reason comes last, because it is the longest."""
    header = ("name", "class", "state", "last seen", "cap", "rows", "version", "reason")
    rows = [
        header,
        *(
            (
                device.name,
                device.device_class,
                device.state,
                "" if device.seen_s is None else human_age(now_s - device.seen_s),
                _size(device.cap_bytes),
                "" if device.example_count is None else str(device.example_count),
                device.runtime_version or "",
                device.reason,
            )
            for device in devices
        ),
    ]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    )


def human_age(seconds: float) -> str:
    """How long ago something was, in the largest unit that it fills."""
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def write_report(run: RunSummary, events: list[EventSummary], folder: Path) -> None:
    """Write the four files into ``folder``, made if missing.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = Report(run, events)
    write_durably(
        folder / "report.json", msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    )
    troubles = [
        f"  {_place(event)}  {f'{event.device}  ' if event.device else ''}{event.code}: {event.message}"
        for event in events
        if event.round is not None or event.code in OF_A_DEVICE
    ]
    aside = set_aside_lines(run)
    table = [text_table(run), "", *aside, *([""] if aside else [])]
    lines = [headline(run), "", *table, "events:", *(troubles or ["  none"]), ""]
    write_durably(folder / "report.txt", "\n".join(lines).encode())
    write_durably(folder / "report.html", run_page(run, events).encode())
    _draw_curve(run, folder / "curve.svg")


def _place(event: EventSummary) -> str:
    """Where an event belongs: to a round, or to the run as a whole."""
    return "run" if event.round is None else f"round {event.round}"


def _draw_curve(run: RunSummary, path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415 - slow to import, only reports draw
    from matplotlib.figure import Figure  # noqa: PLC0415

    points = [
        (entry.round + 1, _height(run.task, entry.accuracy, entry.perplexity), entry.loss)
        for entry in run.counting
        if entry.accuracy is not None
    ]
    if run.initial_accuracy is not None:
        first = _height(run.task, run.initial_accuracy, run.initial_perplexity)
        points.insert(0, (0, first, run.initial_loss))
    figure = Figure(figsize=(7, 4), layout="constrained")
    score_axes = figure.add_subplot()
    label = JUDGED_BY.get(run.task, "accuracy, %")
    score_axes.set(xlabel="rounds", ylabel=label, title=run.run_id)
    scores = [(x, score) for x, score, _ in points if score is not None]
    score_axes.plot([x for x, _ in scores], [score for _, score in scores], "o-", color="tab:blue")
    loss_axes = score_axes.twinx()
    loss_axes.set_ylabel("loss")
    loss_points = [(x, loss) for x, _, loss in points if loss is not None]
    loss_axes.plot([x for x, _ in loss_points], [loss for _, loss in loss_points], ".--", color="tab:orange")
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def _height(task: TaskKind, accuracy: float | None, perplexity: float | None) -> float | None:
    """Where a curve passes: perplexity, or accuracy in per cent."""
    if task == "causal_lm":
        return perplexity
    return None if accuracy is None else 100 * accuracy
