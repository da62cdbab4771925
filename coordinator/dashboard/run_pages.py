"""Runs: the list, one with its rounds and curves as they arrive, and several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from markupsafe import Markup

from coordinator.config import RunConfig
from coordinator.dashboard.fleet import MOST_EVENTS, troubles_of
from coordinator.rounds.rollback import MOST_STATES
from coordinator.rounds.runs import ACTIVE, Run, expected_rounds, find_run, run_of
from coordinator.rounds.summary import round_summary
from coordinator.storage import (
    checkpoint_rows,
    device_rows,
    evaluation_rows,
    fleet_rows,
    round_rows,
    run_rows,
    set_aside_rows,
)
from coordinator.storage.connection import Connection
from coordinator.storage.evaluation_rows import Scores
from coordinator.storage.run_rows import RunRow
from coordinator.storage.stores import Stores
from edge_runtime.described import descriptions
from edge_runtime.html.line_chart import Line, line_chart

#: Runs of a page, rounds of a page, runs beside each other, and runs of the first page.
MOST_RUNS, MOST_ROUNDS, MOST_COMPARED, MOST_FIRST = 30, 25, 4, 4
#: Height of a curve on the first page, in pixels.
FIRST_HEIGHT = 170
OPEN = ("queued", *ACTIVE)
#: Above every number of a row.
END = 1 << 62


@dataclass(frozen=True)
class RunHead:
    """What is said of a run in a line.

    Attributes:
        run_id: id of the run.
        position: its place in the queue.
        state: its state; ``paused`` where the operator paused it.
        reason: why it ended.
        done: number of committed rounds.
        wanted: number of rounds after which it ends; of visits as many as devices make of it.
        package: name of its package.
        score: what it came to, in words; empty without evaluations.
        created_s: moment of its creation.
        is_open: whether it has not ended.
    """

    run_id: str
    position: int
    state: str
    reason: str
    done: int
    wanted: int
    package: str
    score: str
    created_s: float
    is_open: bool


def head_of(stores: Stores, connection: Connection, row: RunRow, devices: int) -> RunHead:
    """A run in a line; ``devices`` is the size of the fleet, by which visits are counted."""
    run = run_of(stores, row)
    done = [scores for scores, counts in evaluation_rows.all_done(connection, row.run_id) if counts]
    return RunHead(
        run_id=row.run_id,
        position=row.position,
        state="paused" if run.paused and row.state in OPEN else row.state,
        reason=row.reason,
        done=row.rounds_done,
        wanted=max(row.rounds_done, expected_rounds(run.config, devices)),
        package=run.manifest.name,
        score=score_words(done[-1]) if done else "",
        created_s=row.created_s,
        is_open=row.state in OPEN,
    )


def score_words(scores: Scores) -> str:
    """What an evaluation found."""
    return f"{100 * scores.accuracy:.1f} %, loss {scores.mean_loss:.4f}"


def run_list(
    stores: Stores, connection: Connection, before: int = END, limit: int = MOST_RUNS
) -> list[RunHead]:
    """Runs, newest first."""
    devices = device_rows.count_enrolled(connection)
    rows = run_rows.newest(connection, before=before, limit=limit)
    return [head_of(stores, connection, row, devices) for row in rows]


def first_curve(connection: Connection, run: Run) -> dict[str, Any] | None:
    """The one curve that says most of a run: accuracy, or else the loss that devices reported; None without a round."""
    done = [scores for scores, counts in evaluation_rows.all_done(connection, run.run_id) if counts]
    if done:
        accuracy = tuple((float(scores.round + 1), scores.accuracy) for scores in done)
        return _chart(run.run_id, "Accuracy", [Line("accuracy", accuracy)], percent=True, height=FIRST_HEIGHT)
    losses = tuple((float(number + 1), loss) for number, loss in _train_losses(connection, run))
    return (
        _chart(run.run_id, "Loss that devices reported", [Line("loss", losses)], height=FIRST_HEIGHT)
        if losses
        else None
    )


def _train_losses(connection: Connection, run: Run) -> list[tuple[int, float]]:
    """Loss that devices reported, by round; none where noise or masks hide what they trained on."""
    if run.config.privacy is not None or run.config.secure_aggregation or run.config.shown_group > 1:
        return []
    return fleet_rows.train_losses(connection, run.run_id)


def curves(connection: Connection, run: Run, key: str = "run") -> list[dict[str, Any]]:
    """The run's curves that have any points: accuracy, loss of evaluations, loss that devices reported."""
    done = [scores for scores, counts in evaluation_rows.all_done(connection, run.run_id) if counts]
    trained = [(float(number + 1), loss) for number, loss in _train_losses(connection, run)]
    evaluated = [(float(scores.round + 1), scores.mean_loss) for scores in done]
    accuracy = [(float(scores.round + 1), scores.accuracy) for scores in done]
    drawn = []
    if accuracy:
        drawn.append(_chart(f"{key}-accuracy", "Accuracy", [Line("accuracy", tuple(accuracy))], percent=True))
    losses = [
        Line(name, tuple(points))
        for name, points in (("loss of evaluations", evaluated), ("loss that devices reported", trained))
        if points
    ]
    if losses:
        drawn.append(_chart(f"{key}-loss", "Loss", losses))
    return drawn


def _chart(
    key: str, title: str, lines: Sequence[Line], *, percent: bool = False, height: int = 240
) -> dict[str, Any]:
    # Drawn by our own code, which escapes every text in it.
    drawing = Markup(line_chart(key, title, lines, height=height, percent=percent))  # noqa: S704
    return {"title": title, "svg": drawing, "lines": [line.name for line in lines]}


def run_page(stores: Stores, connection: Connection, run_id: str, before: int) -> dict[str, Any]:
    """All about a run; rounds below ``before``.

    Raises:
        NotFoundError: ``unknown_run``.
    """
    run = find_run(stores, connection, run_id)
    row = run_rows.get(connection, run.run_id)
    evaluations = {scores.round: scores for scores, _ in evaluation_rows.all_done(connection, run.run_id)}
    rounds = round_rows.newest_rounds(connection, run.run_id, before=before, limit=MOST_ROUNDS)
    possible = (
        checkpoint_rows.restorable(connection, run.run_id, most=MOST_STATES) if row.state in ACTIVE else []
    )
    return {
        "run": run,
        "row": row,
        "head": head_of(stores, connection, row, device_rows.count_enrolled(connection)),
        "curves": curves(connection, run),
        "rounds": [
            round_summary(connection, run.config, entry, evaluations.get(entry.round)) for entry in rounds
        ],
        "older": rounds[-1].round if rounds and rounds[-1].round > 0 else None,
        "paged": before < END,
        "possible": possible,
        "last_committed": round_rows.last_committed(connection, run.run_id),
        "troubles": troubles_of(connection, run.run_id),
        "aside": set_aside_rows.of_run(connection, run.run_id),
        "events": fleet_rows.newest_events(connection, run.run_id, limit=MOST_EVENTS),
        "settings": settings(run.config),
    }


def settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """Keys of a configuration that are not at their defaults: key, value, and what the key means."""
    found = []
    for path, value, meaning, default in _keys(config, ""):
        if value != default:
            found.append((path, msgspec.json.encode(value).decode(), meaning))
    return found


def _keys(struct: msgspec.Struct, path: str) -> list[tuple[str, Any, str, Any]]:
    meanings = descriptions(type(struct))
    found: list[tuple[str, Any, str, Any]] = []
    for field in msgspec.structs.fields(type(struct)):
        value = getattr(struct, field.name)
        if isinstance(value, msgspec.Struct):
            found += _keys(value, f"{path}{field.encode_name}.")
        else:
            found.append((f"{path}{field.encode_name}", value, meanings[field.name], field.default))
    return found


def comparison(stores: Stores, connection: Connection, run_ids: Sequence[str]) -> dict[str, Any]:
    """Runs side by side: their curves in one drawing, and the settings in which they differ.

    Raises:
        NotFoundError: ``unknown_run``.
    """
    runs = [find_run(stores, connection, run_id) for run_id in dict.fromkeys(run_ids)][:MOST_COMPARED]
    devices = device_rows.count_enrolled(connection)
    heads = [head_of(stores, connection, run_rows.get(connection, run.run_id), devices) for run in runs]
    accuracy, loss = [], []
    for run in runs:
        done = [scores for scores, counts in evaluation_rows.all_done(connection, run.run_id) if counts]
        points = tuple((float(scores.round + 1), scores.accuracy) for scores in done)
        if points:
            accuracy.append(Line(run.run_id, points))
        losses = [(float(scores.round + 1), scores.mean_loss) for scores in done] or [
            (float(number + 1), value) for number, value in _train_losses(connection, run)
        ]
        if losses:
            loss.append(Line(run.run_id, tuple(losses)))
    charts = [_chart("compared-accuracy", "Accuracy", accuracy, percent=True)] if accuracy else []
    charts += [_chart("compared-loss", "Loss", loss)] if loss else []
    kept = [{path: value for path, value, _, _ in _keys(run.config, "")} for run in runs]
    meanings = {path: meaning for run in runs for path, _, meaning, _ in _keys(run.config, "")}
    differing = [
        (path, meanings[path], [msgspec.json.encode(each.get(path)).decode() for each in kept])
        for path in meanings
        if len({msgspec.json.encode(each.get(path)) for each in kept}) > 1
    ]
    return {
        "heads": heads,
        "curves": charts,
        "differing": differing,
        "choice": run_list(stores, connection),
        "chosen": [run.run_id for run in runs],
        "most": MOST_COMPARED,
    }
