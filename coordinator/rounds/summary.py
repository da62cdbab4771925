"""What a run has done so far, gathered from the database for operators: rounds, evaluations, events."""

from __future__ import annotations

import math
import sqlite3

from msgspec import Struct

from coordinator.config import RunConfig
from coordinator.rounds.runs import Run
from coordinator.storage import evaluation_rows, event_rows, result_rows, round_rows, run_rows, task_rows
from coordinator.storage.evaluation_rows import Scores
from coordinator.storage.round_rows import RoundRow
from edge_runtime.package.manifest import TaskKind


class RoundSummary(Struct, frozen=True):
    """One round.

    Bytes are of request and response bodies; ``bytes_up_per_task`` is the mean over counted results of the delta
    alone, safetensors header included. Peaks are the largest over the round's devices. ``accuracy`` and ``loss`` are
    the global model's on the coordinator's rows after the round, ``train_loss`` the example-weighted mean the devices
    reported. For language modelling ``accuracy`` is the share of next tokens predicted right, ``loss`` the mean over
    tokens, and ``perplexity`` its exponential. A ``gated`` round was committed and left the values as they were.
    None: not measured (yet).
    """

    round: int
    state: str
    reason: str
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float | None
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    devices: list[str]
    results: int
    refused: int
    failed: int
    examples: int
    perplexity: float | None = None
    bytes_up_per_task: float | None = None
    gated: bool = False


class RunSummary(Struct, frozen=True):
    """A run with its rounds; ``initial_*`` are of the values it started from.

    ``values_sha256`` names what ``fetch-slices`` gives and evaluations meet: with ``average_from_round`` the mean, once
    there is one.
    """

    run_id: str
    name: str
    state: str
    reason: str
    rounds_committed: int
    rounds_wanted: int
    initial_accuracy: float | None
    initial_loss: float | None
    created_s: float
    started_s: float | None
    finished_s: float | None
    package_sha256: str
    values_sha256: str
    config: RunConfig
    rounds: list[RoundSummary] = []
    task: TaskKind = "classification"
    initial_perplexity: float | None = None


class EventSummary(Struct, frozen=True):
    """One event; ``at_s`` in seconds since 1970."""

    event_id: int
    at_s: float
    round: int | None
    device: str | None
    task_id: str | None
    code: str
    message: str


#: A loss whose exponential is still a finite float.
LARGEST_LOSS = 700.0
#: Why a task lapsed, as operators count it.
REFUSED = frozenset({"task_refused", "cap_too_small"})
FAILED = frozenset({"task_failed", "out_of_memory", "silent", "late", "revoked"})


def summarise(connection: sqlite3.Connection, run: Run, *, with_rounds: bool = True) -> RunSummary:
    """A run as it stands; read-only."""
    row = run_rows.get(connection, run.run_id)
    evaluations = {scores.round: scores for scores in evaluation_rows.done(connection, run.run_id)}
    initial = evaluations.get(-1)
    rounds = []
    if with_rounds:
        rounds = [
            _round(connection, entry, evaluations.get(entry.round))
            for entry in round_rows.all_rounds(connection, run.run_id)
        ]
    return RunSummary(
        run_id=run.run_id,
        name=run.config.name,
        state=run.state,
        reason=row.reason,
        rounds_committed=run.committed,
        rounds_wanted=run.config.rounds,
        initial_accuracy=initial.accuracy if initial else None,
        initial_loss=initial.mean_loss if initial else None,
        created_s=row.created_s,
        started_s=row.started_s,
        finished_s=row.finished_s,
        package_sha256=run.package_sha256,
        values_sha256=run.result_sha256,
        config=run.config,
        rounds=rounds,
        task=run.manifest.task,
        initial_perplexity=_perplexity(initial),
    )


def events_of(connection: sqlite3.Connection, run_id: str, after: int, limit: int) -> list[EventSummary]:
    """Events of a run, and those of no run, with an id above ``after``, oldest first, at most ``limit``."""
    rows = event_rows.of_run(connection, run_id, after=after, limit=limit)
    return [EventSummary(**row) for row in rows]


def _round(connection: sqlite3.Connection, row: RoundRow, evaluation: Scores | None) -> RoundSummary:
    tasks = task_rows.outcomes(connection, row.run_id, row.round)
    results = result_rows.of_round(connection, row.run_id, row.round)
    memories = [result.memory for result in results]
    weighed = [(r.mean_loss, r.examples) for r in results if r.mean_loss is not None and r.examples]
    examples = sum(result.examples for result in results)
    return RoundSummary(
        round=row.round,
        state=row.state,
        reason=row.reason,
        accuracy=evaluation.accuracy if evaluation else None,
        loss=evaluation.mean_loss if evaluation else None,
        train_loss=sum(loss * n for loss, n in weighed) / sum(n for _, n in weighed) if weighed else None,
        bytes_up=row.bytes_up,
        bytes_down=row.bytes_down,
        seconds=None if row.closed_s is None else row.closed_s - row.opened_s,
        predicted_peak_bytes=max((memory.predicted_peak_bytes for memory in memories), default=None),
        measured_peak_bytes=max(
            (max(memory.high_water_bytes, memory.cgroup_peak_bytes or 0) for memory in memories), default=None
        ),
        devices=[task.device_name for task in tasks if task.state == "counted"],
        results=len(results),
        refused=sum(task.reason in REFUSED for task in tasks),
        failed=sum(task.reason in FAILED for task in tasks),
        examples=examples,
        perplexity=_perplexity(evaluation),
        gated=bool(row.gated),
        bytes_up_per_task=sum(r.change_bytes for r in results) / len(results) if results else None,
    )


def _perplexity(evaluation: Scores | None) -> float | None:
    """exp of the mean loss over tokens; None if that is not what was measured, or too large for a number."""
    if evaluation is None or not evaluation.tokens or evaluation.mean_loss > LARGEST_LOSS:
        return None
    return math.exp(evaluation.mean_loss)
