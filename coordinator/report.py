"""A run's report: report.json for programs, report.txt for people, curve.svg for pages."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coordinator.summary import EventSummary, RoundSummary, RunSummary
from edge_runtime.durable import write_durably

COLUMNS = ("round", "accuracy", "loss", "up", "down", "seconds", "peak predicted", "peak measured")


def row(summary: RoundSummary) -> tuple[str, ...]:
    """One round as texts, in the order of :data:`COLUMNS`; a dash for what was not measured."""
    return (
        str(summary.round) if summary.state == "committed" else f"{summary.round} {summary.state}",
        "-" if summary.accuracy is None else f"{100 * summary.accuracy:.1f} %",
        "-" if summary.loss is None else f"{summary.loss:.4f}",
        human_bytes(summary.bytes_up),
        human_bytes(summary.bytes_down),
        "-" if summary.seconds is None else f"{summary.seconds:.1f}",
        human_bytes(summary.predicted_peak_bytes),
        human_bytes(summary.measured_peak_bytes),
    )


def headline(run: RunSummary) -> str:
    """The run in one line."""
    start = "" if run.initial_accuracy is None else f", from {100 * run.initial_accuracy:.1f} %"
    reason = f" ({run.reason})" if run.reason else ""
    return f"{run.run_id}: {run.state}{reason}, {run.rounds_committed} of {run.rounds_wanted} rounds{start}"


def human_bytes(count: int | None) -> str:
    """Bytes in the largest binary unit that leaves a digit before the point."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def text_table(rounds: list[RoundSummary]) -> str:
    """All rounds as aligned plain text."""
    rows = [COLUMNS, *(row(entry) for entry in rounds)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows
    ]
    return "\n".join(lines)


def write_report(run: RunSummary, events: list[EventSummary], folder: Path) -> None:
    """Write the three files into ``folder``, made if missing.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {"run": run, "events": events}
    write_durably(
        folder / "report.json", msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    )
    troubles = [
        f"  round {event.round}  {event.device or '-'}  {event.code}: {event.message}"
        for event in events
        if event.round is not None or event.code == "cap_too_small"
    ]
    lines = [headline(run), "", text_table(run.rounds), "", "events:", *(troubles or ["  none"]), ""]
    write_durably(folder / "report.txt", "\n".join(lines).encode())
    _draw_curve(run, folder / "curve.svg")


def _draw_curve(run: RunSummary, path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415 - slow to import, only reports draw
    from matplotlib.figure import Figure  # noqa: PLC0415

    points = [
        (entry.round + 1, entry.accuracy, entry.loss) for entry in run.rounds if entry.accuracy is not None
    ]
    if run.initial_accuracy is not None:
        points.insert(0, (0, run.initial_accuracy, run.initial_loss))
    figure = Figure(figsize=(7, 4), layout="constrained")
    accuracy_axes = figure.add_subplot()
    accuracy_axes.set(xlabel="rounds", ylabel="accuracy, %", title=run.run_id)
    accuracy_axes.plot(
        [x for x, _, _ in points], [100 * (y or 0) for _, y, _ in points], "o-", color="tab:blue"
    )
    loss_axes = accuracy_axes.twinx()
    loss_axes.set_ylabel("loss")
    loss_points = [(x, loss) for x, _, loss in points if loss is not None]
    loss_axes.plot([x for x, _ in loss_points], [loss for _, loss in loss_points], ".--", color="tab:orange")
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
