"""A run's report as one HTML page: what was learned, what it took, and who did it.

Every text that comes from a run is escaped. What was not measured is left out or said to be so. An example adds its own
comparisons on top (:class:`Additions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from coordinator.rounds.robustness import WARNING
from coordinator.rounds.summary import TROUBLES, EventSummary, RoundSummary, RunSummary
from edge_runtime import __version__
from edge_runtime.figures import duration, plural, share, size
from edge_runtime.html.line_chart import Line, line_chart, line_kind
from edge_runtime.html.parts import (
    Row,
    capital,
    document,
    facts,
    figure,
    folded_section,
    gauge,
    gauge_key,
    key,
    prose,
    section,
    table,
    tiles,
)

_SHORT_DIGEST = 12
#: What a page shows at most, so that it stays small however long a run was: rounds, devices, characters of a message.
MOST_ROUNDS, MOST_DEVICES, MOST_MESSAGE = 60, 100, 300
#: How a run's state is told, and whether it is good, bad or neither.
_STATES = {
    "finished": ("✓ Finished", "pass"),
    "failed": ("✕ Failed", "fail"),
    "stopped": ("✕ Stopped", "fail"),
    "running": ("… Running", "open"),
    "evaluating": ("… Evaluating", "open"),
    "queued": ("… Queued", "open"),
}
#: Code of an event that is none of trouble.
HEAD_SOLVED = "head_solved"
_ENGINES = {"onnxruntime": "ONNX Runtime", "executorch": "ExecuTorch"}
_UPDATES = {
    "forward": "forward mode",
    "backprop": "backpropagation",
    "zero_order": "zero order",
    "best": "the best of forward mode and backpropagation",
}


@dataclass(frozen=True)
class Additions:
    """What an example shows on top of its run's page.

    Attributes:
        title: title of the page, instead of the run's id.
        lead: a sentence below it.
        comparisons: further figures, as names and values.
        lines: curves to draw beside the run's own score.
    """

    title: str
    lead: str
    comparisons: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...] = ()


def run_page(run: RunSummary, events: Sequence[EventSummary], additions: Additions | None = None) -> str:
    """The page of a run.

    Args:
        run: the run with its rounds.
        events: its events.
        additions: what an example adds; None for a plain run.
    """
    return document(
        f"{additions.title if additions else run.run_id}: {headline(run)}",
        "\n".join(
            (
                _header(run, additions),
                _comparisons(additions),
                _curves(run, additions),
                _rounds(run),
                _troubles(events),
                _devices(run),
                _facts(run, events),
            )
        ),
    )


def _privacy(run: RunSummary) -> str:
    """What a run with privacy has given away, as a paragraph; empty without."""
    if run.privacy is None or run.config.privacy is None:
        return ""
    end = run.privacy.epsilon_at_end
    most = "" if end is None else f", at most {end:.3g} at the end"
    return (
        f"<p>{prose(f'Differential privacy: epsilon {run.privacy.epsilon:.3g} so far{most}')}, "
        f"{prose(f'at delta {run.config.privacy.delta:g}, for each {run.config.privacy.unit}; noise is added by the')} "
        f"{prose(run.config.privacy.where)}.</p>"
    )


def headline(run: RunSummary) -> str:
    """What the run came to, in a sentence without its full stop."""
    rounds = plural(run.rounds_committed, "round")
    first, last = first_score(run), last_score(run)
    if last is None:
        of = "" if run.rounds_committed == run.rounds_wanted else f" of {run.rounds_wanted}"
        return f"{run.rounds_committed}{of} rounds committed, without an evaluation"
    name = "perplexity" if run.task == "causal_lm" else "accuracy"
    text = score_text(run, last)
    if first is None:
        return f"{capital(name)} {text} after {rounds}"
    if score_text(run, first) == text:
        return f"{capital(name)} stayed at {text} in {rounds}"
    return f"{capital(name)} {'rose' if last > first else 'fell'} from {score_text(run, first)} to {text} in {rounds}"


def first_score(run: RunSummary) -> float | None:
    """What the values that the run started from are worth; None if they were not evaluated."""
    return run.initial_perplexity if run.task == "causal_lm" else run.initial_accuracy


def last_score(run: RunSummary) -> float | None:
    """What the values are worth after the last round that was evaluated; None without any."""
    found = [score for entry in run.counting if (score := _score(run, entry)) is not None]
    return found[-1] if found else None


def score_text(run: RunSummary, score: float) -> str:
    """A score as text: accuracy in per cent, perplexity as a number."""
    return f"{score:.3f}" if run.task == "causal_lm" else f"{100 * score:.1f} %"


def largest(values: Sequence[int | None]) -> int | None:
    """The largest of what was measured; None if nothing was."""
    return max((value for value in values if value is not None), default=None)


def took_s(run: RunSummary) -> float | None:
    """Seconds from the start of a run to its end; None while it has not ended."""
    if run.started_s is None or run.finished_s is None:
        return None
    return max(0.0, run.finished_s - run.started_s)


def score_line(run: RunSummary, name: str) -> Line:
    """The run's own score over committed rounds."""
    points = [(0.0, first_score(run)), *((x, _score(run, entry)) for x, entry in _committed(run))]
    return Line(name, tuple((x, score) for x, score in points if score is not None))


def _score(run: RunSummary, entry: RoundSummary) -> float | None:
    return entry.perplexity if run.task == "causal_lm" else entry.accuracy


def _committed(run: RunSummary) -> list[tuple[float, RoundSummary]]:
    """Committed rounds, each with how many there are up to it."""
    rounds = [entry for entry in run.counting if entry.state == "committed"]
    return [(float(count), entry) for count, entry in enumerate(rounds, 1)]


def _header(run: RunSummary, additions: Additions | None) -> str:
    word, tone = _STATES.get(run.state, (capital(run.state), "open"))
    title = f"{additions.title}: run {run.run_id}" if additions else f"Run {run.run_id}"
    lead = f'<p class="lead">{prose(additions.lead)}</p>' if additions else ""
    took = took_s(run)
    ended = f"{capital(run.reason)}. " if run.reason else ""
    if took is not None:
        ended += f"It took {duration(took)}."
    return f"""<header>
<h1>{escape(title)}</h1>{lead}
<div class="verdict {tone}">
<p class="word">{escape(word)}</p>
<p class="figure">{prose(headline(run))}</p>{_privacy(run)}
{f'<p class="advice">{prose(ended.strip())}</p>' if ended else ""}
{_memory(run)}
</div>
{_tiles(run)}
</header>"""


def _caps(run: RunSummary) -> list[int]:
    return sorted({cap for entry in run.rounds for cap in entry.caps_bytes})


def _memory(run: RunSummary) -> str:
    """Predicted beside measured peak of the workers, within the cap."""
    measured = largest([entry.measured_peak_bytes for entry in run.rounds])
    predicted = largest([entry.predicted_peak_bytes for entry in run.rounds])
    if measured is None or predicted is None:
        return '<p class="lead">Memory: not measured, no result was counted.</p>'
    caps = _caps(run)
    error = (predicted - measured) / measured
    told = (
        f"Workers took at most {size(measured)}; {size(predicted)} were predicted at most, {share(abs(error))} "
        f"{'above' if error >= 0 else 'below'}."
    )
    if not caps:
        return f'<p class="basis">{prose(told)}</p>'
    if len(caps) > 1:
        told += f" The devices' caps are {size(caps[0])} to {size(caps[-1])}."
        return f'<p class="basis">{prose(told)}</p>'
    left = caps[0] - measured
    told += f" The cap is {size(caps[0])}, "
    told += f"{share(left / caps[0])} of it left free." if left >= 0 else f"{size(-left)} less."
    return (
        gauge(caps[0], measured, predicted) + gauge_key(charged=False) + f'<p class="basis">{prose(told)}</p>'
    )


def _tiles(run: RunSummary) -> str:
    entries: list[tuple[str, str, str]] = []
    first, last = first_score(run), last_score(run)
    if last is not None:
        name = "Perplexity" if run.task == "causal_lm" else "Accuracy"
        entries.append(
            (name, score_text(run, last), f"from {score_text(run, first)}" if first is not None else "")
        )
    losses = [entry.loss for entry in run.counting if entry.loss is not None]
    if losses:
        start = "" if run.initial_loss is None else f"from {run.initial_loss:.3f}"
        entries.append(("Loss", f"{losses[-1]:.3f}", start))
    entries.append(("Rounds", f"{run.rounds_committed:,}", f"of {run.rounds_wanted:,}"))
    took = took_s(run)
    if took is not None:
        entries.append(("Took", duration(took), "from start to end"))
    down = sum(entry.bytes_down for entry in run.rounds)
    entries += [
        ("Bytes up", size(sum(entry.bytes_up for entry in run.rounds)), "from all devices"),
        ("Bytes down", size(down), "to all devices, packages included"),
    ]
    measured = largest([entry.measured_peak_bytes for entry in run.rounds])
    if measured is not None:
        entries.append(("Peak memory", size(measured), "of a worker, at most"))
    lost = sum(entry.refused + entry.failed for entry in run.rounds)
    entries.append(("Lost tasks", str(lost), "refused or failed"))
    return tiles(entries)


def _comparisons(additions: Additions | None) -> str:
    if additions is None:
        return ""
    return section("What it is compared with", facts("On the same rows", additions.comparisons))


def _curves(run: RunSummary, additions: Additions | None) -> str:
    name = "perplexity" if run.task == "causal_lm" else "accuracy"
    lines = [score_line(run, "this run"), *(additions.lines if additions else ())]
    scores = line_chart("score", name, lines, height=300, percent=run.task != "causal_lm")
    losses = [(0.0, run.initial_loss), *((x, entry.loss) for x, entry in _committed(run))]
    trained = [(x, entry.train_loss) for x, entry in _committed(run)]
    loss_lines = [
        Line("on the coordinator's rows", tuple((x, loss) for x, loss in losses if loss is not None)),
        Line("on the devices' rows", tuple((x, loss) for x, loss in trained if loss is not None)),
    ]
    loss = line_chart("loss", "loss", loss_lines, height=260)
    content = ""
    if len(lines[0].points) > 1:
        content += _chart(f"{capital(name)} on the coordinator's rows", lines, scores)
    if any(len(line.points) > 1 for line in loss_lines):
        content += _chart("Loss", loss_lines, loss)
    return section(
        "Learning curve", content or "<p>Fewer than two rounds were measured: there is no curve.</p>"
    )


def _chart(title: str, lines: Sequence[Line], drawings: str) -> str:
    legend = key(*((line_kind(index), line.name) for index, line in enumerate(lines) if line.points))
    return figure(f"{escape(title)}{legend}", drawings)


#: Columns of the table of rounds: name, and what stands there for a round; empty where nothing was measured.
_COLUMNS: tuple[tuple[str, Callable[[RunSummary, RoundSummary], str]], ...] = (
    ("perplexity", lambda _, entry: "" if entry.perplexity is None else f"{entry.perplexity:.3f}"),
    (
        "accuracy",
        lambda run, entry: (
            "" if entry.accuracy is None or run.task == "causal_lm" else f"{100 * entry.accuracy:.1f} %"
        ),
    ),
    ("loss", lambda _, entry: "" if entry.loss is None else f"{entry.loss:.3f}"),
    ("training loss", lambda _, entry: "" if entry.train_loss is None else f"{entry.train_loss:.3f}"),
    ("devices", lambda _, entry: str(len(entry.devices))),
    ("up", lambda _, entry: size(entry.bytes_up)),
    ("down", lambda _, entry: size(entry.bytes_down)),
    ("took", lambda _, entry: "" if entry.seconds is None else duration(entry.seconds)),
    (
        "predicted",
        lambda _, entry: "" if entry.predicted_peak_bytes is None else size(entry.predicted_peak_bytes),
    ),
    (
        "measured",
        lambda _, entry: "" if entry.measured_peak_bytes is None else size(entry.measured_peak_bytes),
    ),
)


def _rounds(run: RunSummary) -> str:
    if not run.rounds:
        return section("Rounds", "<p>No round was opened.</p>")
    shown = run.rounds[-MOST_ROUNDS:]
    columns = [(name, [told(run, entry) for entry in shown]) for name, told in _COLUMNS]
    kept = [(name, cells) for name, cells in columns if any(cells)]
    rows = [
        Row(
            (_round_name(entry), *(prose(cells[index]) for _, cells in kept)),
            "" if entry.state == "committed" else "no",
        )
        for index, entry in enumerate(shown)
    ]
    every = run.config.evaluation.every_rounds if run.config.evaluation else 0
    caption = "Rounds, numbered from 0; predicted and measured is the largest peak memory of a worker"
    if every > 1:
        caption += f"; values are evaluated after every {every} committed ones and after the last"
    if len(shown) < len(run.rounds):
        caption = f"The last {len(shown)} of {len(run.rounds):,}; report.txt has all. {caption}"
    return section(
        "Rounds",
        table(
            caption,
            ("round", *(name for name, _ in kept)),
            rows,
            numbers=range(1, len(kept) + 1),
            kind="rounds",
        ),
    )


def _round_name(entry: RoundSummary) -> str:
    if entry.rolled_back:
        return f"{entry.round}, rolled back"
    if entry.gated:
        return f"{entry.round}, left the values as they were"
    if entry.state == "committed":
        return str(entry.round)
    return escape(f"{entry.round}, {entry.state}{f': {entry.reason}' if entry.reason else ''}")


def _troubles(events: Sequence[EventSummary]) -> str:
    """What went wrong, by reason, the most frequent first."""
    found = [
        event
        for event in events
        if (event.round is not None and event.code != HEAD_SOLVED)
        or event.code in ("cap_too_small", "not_eligible")
    ]
    if not found:
        return section(
            "Refusals and failures", "<p>None: no device refused or failed a task, or was silent or late.</p>"
        )
    rows = []
    for code, count in Counter(event.code for event in found).most_common():
        own = [event for event in found if event.code == code]
        devices = sorted({event.device for event in own if event.device is not None})
        rows.append(
            Row(
                (
                    escape(TROUBLES.get(code, code)),
                    f"{count:,}",
                    escape(_some(devices)),
                    prose(own[-1].message[:MOST_MESSAGE]),
                )
            )
        )
    return section(
        "Refusals and failures",
        table(
            "What went wrong, by reason", ("reason", "times", "devices", "last message"), rows, numbers=(1,)
        ),
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    """A few names, and how many there are besides."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _devices(run: RunSummary) -> str:
    counts = Counter(name for entry in run.rounds for name in entry.devices)
    if not counts:
        return ""
    shown = sorted(counts)[:MOST_DEVICES]
    rows = [Row((escape(name), f"{counts[name]:,}")) for name in shown]
    caption = "Results of each device that counted"
    if len(shown) < len(counts):
        caption += f"; the first {len(shown)}, report.json has all"
    return folded_section(
        f"Who took part: {plural(len(counts), 'device')}",
        table(caption, ("device", "results"), rows, numbers=(1,)),
    )


def robustness_lines(run: RunSummary) -> list[str]:
    """How accuracy changed over groups that took part and over others, with its warning; none without groups."""
    found = run.robustness
    if found is None:
        return []
    shares = (("seen", found.seen), ("unseen", found.unseen), ("crrm stand-in", found.crrm_standin))
    told = ", ".join(f"{name} {100 * value:+.1f} %" for name, value in shares if value is not None)
    return [f"Relative change of accuracy over groups of devices: {told}. {WARNING}"]


def _facts(run: RunSummary, events: Sequence[EventSummary]) -> str:
    config = run.config
    solved = [event.message for event in events if event.code == HEAD_SOLVED]
    blocks = ", ".join(map(str, config.features))
    caps = _caps(run)
    package = (
        f"{run.package_name}, sha256 {run.package_sha256}"
        if run.package_name
        else f"sha256 {run.package_sha256}"
    )
    draws = f", {plural(config.draws, 'draw')}" if config.update != "backprop" else ""
    pairs = [
        ("run", f"{run.run_id}, named {run.name}"),
        ("package", package.replace(run.package_sha256, run.package_sha256[:_SHORT_DIGEST])),
        ("runtime of the devices", ", ".join(f"edge-runtime {version}" for version in run.runtime_versions)),
        ("engine", " or ".join(_ENGINES.get(name, name) for name in run.engines)),
        ("this page", f"edge-coordinator {__version__}"),
        ("cap", " to ".join(size(cap) for cap in dict.fromkeys([caps[0], caps[-1]])) if caps else ""),
        ("the head reads", f"blocks {blocks} (0 is the embedding's output)" if blocks else ""),
        ("the head", solved[-1] if solved else ""),
        ("robustness", " ".join(robustness_lines(run))),
        (
            "a task",
            "one pass over all rows of the device, for sums"
            if not config.rounds
            else f"{plural(config.steps, 'step')} of {plural(config.batch_size, 'example')}, at most "
            f"{plural(config.sequence_limit, 'token')}; {_UPDATES[config.update]}{draws}",
        ),
        (
            "a round",
            f"{plural(config.devices_per_round, 'device')}, at least {plural(config.min_results, 'result')}",
        ),
        ("seed", str(config.seed)),
        ("started", "" if run.started_s is None else _moment(run.started_s)),
        ("ended", "" if run.finished_s is None else _moment(run.finished_s)),
    ]
    words = (
        "Sizes are in MiB (2^20 bytes), small ones in KiB (2^10 bytes). A peak is the most memory that a worker had in "
        "RAM at once, or that the kernel charged it with if that is more; of a round it is the largest of its workers."
    )
    shown = facts("Settings and versions", [(name, value) for name, value in pairs if value])
    return folded_section("Settings and versions", f'{shown}<p class="lead">{prose(words)}</p>')


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
