"""What a run has done so far, gathered from the database for operators: rounds, evaluations, events."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

from msgspec import Struct, structs

from coordinator.config import RunConfig
from coordinator.rounds.presence import SLACK_S
from coordinator.rounds.robustness import GroupScore, Robustness, robustness_of
from coordinator.rounds.runs import Run, active_runs, expected_rounds
from coordinator.rounds.tasks import least_required_bytes
from coordinator.storage import (
    device_rows,
    evaluation_rows,
    event_rows,
    privacy_rows,
    release_rows,
    result_rows,
    round_rows,
    run_rows,
    set_aside_rows,
    task_rows,
)
from coordinator.storage.connection import Connection, Row
from coordinator.storage.evaluation_rows import Scores
from coordinator.storage.round_rows import RoundRow
from coordinator.storage.stores import Stores
from edge_runtime.package.manifest import TaskKind


class RoundSummary(Struct, frozen=True):
    """One round. None stands for what was not measured, or not yet.

    Attributes:
        round: number of the round, from 0.
        state: selecting, collecting, aggregating, committed or abandoned.
        reason: why the round was abandoned; empty otherwise.
        accuracy: the global model's accuracy on the coordinator's rows after the round; for language modelling, the
            share of next tokens that it predicted right.
        loss: the global model's mean loss over these rows; for language modelling, over their tokens.
        train_loss: mean loss that the devices reported, weighted by examples.
        bytes_up: bytes of the bodies that devices sent during the round.
        bytes_down: bytes of the bodies that devices got during the round.
        seconds: duration from opening to closing.
        predicted_peak_bytes: largest predicted peak of memory among the round's devices.
        measured_peak_bytes: largest measured peak of memory among the round's devices.
        devices: names of the devices whose results counted, in the order of their slots.
        results: number of results that counted.
        refused: number of tasks that devices refused.
        failed: number of tasks that devices failed, or did not answer in time.
        examples: number of examples behind the counted results.
        perplexity: exponential of the loss, for language modelling alone.
        bytes_up_per_task: mean size of the counted results' deltas or sums, safetensors header included; sums that came
            back to be taken off count too.
        gated: whether the round was committed and left the values as they were.
        caps_bytes: caps that the workers of its counted results were held to, each once, smallest first.
        left_out: names of the devices whose results did not enter the mean, in the order of their slots.
        scores: how many times each device's change exceeded the round's median, by name; where that is a number.
        rolled_back: whether the operator took it back: it counts no more.
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
    caps_bytes: list[int] = []
    left_out: list[str] = []
    scores: dict[str, float] = {}
    rolled_back: bool = False


class PrivacySummary(Struct, frozen=True):
    """What a run with privacy has given away, at most.

    Attributes:
        epsilon: ε so far, at ``delta`` of the configuration, for each ``unit`` of it.
        participations: number of rounds and visits that the busiest device has taken part in.
        noise_multiplier: standard deviation of the noise over ``clip_norm``.
        epsilon_at_end: ε if a device takes part in all that it may; None if that was not worked out.
    """

    epsilon: float
    participations: int
    noise_multiplier: float
    epsilon_at_end: float | None = None


class RunSummary(Struct, frozen=True):
    """A run with its rounds. None stands for what was not measured, or not yet.

    Attributes:
        run_id: id of the run.
        name: name that the configuration gives it.
        state: queued, running, evaluating, finished, failed or stopped.
        reason: why the run ended; empty until then.
        rounds_committed: number of committed rounds.
        rounds_wanted: number of committed rounds after which the run ends.
        initial_accuracy: accuracy of the values that the run started from.
        initial_loss: mean loss of the values that the run started from.
        created_s: moment of its creation, in seconds since 1970.
        started_s: moment of its start, in seconds since 1970.
        finished_s: moment of its end, in seconds since 1970.
        package_sha256: digest of the package's manifest.
        values_sha256: digest of the values that ``fetch-slices`` gives and evaluations meet: with
            ``average_from_round`` the mean, once there is one.
        config: configuration of the run.
        rounds: its rounds, in order; empty where runs are only listed.
        task: task of its package.
        initial_perplexity: perplexity of the values that the run started from, for language modelling alone.
        package_name: name of the package.
        engines: names of the engines that the package has programs for.
        runtime_versions: versions of the program on the devices whose results counted, as they last told.
        set_aside: devices that the run asks no more, by name.
        paused: whether the operator paused it: no round opens until it is resumed.
        not_eligible: number of devices that may not work now, by the reason that they told.
        robustness: change of accuracy from the values that the run started from to the last ones evaluated, over the
            groups of ``evaluation.groups``; ``crrm_standin`` there stands in for a published metric whose formula was
            not at hand. None without groups.
        privacy: what a run with privacy has given away; None without.
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
    package_name: str = ""
    engines: list[str] = []
    runtime_versions: list[str] = []
    set_aside: list[SetAside] = []
    paused: bool = False
    not_eligible: dict[str, int] = {}
    robustness: Robustness | None = None
    privacy: PrivacySummary | None = None

    @property
    def counting(self) -> list[RoundSummary]:
        """Its rounds without those that the operator took back."""
        return [entry for entry in self.rounds if not entry.rolled_back]


class SetAside(Struct, frozen=True):
    """A device that a run asks no more.

    Attributes:
        device: name of the device.
        at_s: moment when it was set aside, in seconds since 1970.
        reason: what it failed for.
    """

    device: str
    at_s: float
    reason: str


class DeviceSummary(Struct, frozen=True):
    """A device; moments are in seconds since 1970.

    Attributes:
        device_id: random id of the device.
        name: name that the operator gave it.
        device_class: kind of device, as it said when it enrolled.
        enrolled_s: moment of its enrolment.
        revoked_s: moment when it was revoked; None if it was not.
        seen_s: moment of its last check-in; None before the first.
        cap_bytes: memory that it granted at its last check-in.
        example_count: number of examples that it had at its last check-in.
        runtime_version: version of its program at its last check-in.
        state: what may be expected of it: ``working`` on a task, ``asked`` for one, ``ready``, ``silent`` (overdue),
            ``set aside`` by the run that is going on, ``cap too small`` for it, ``not eligible`` by its own conditions,
            ``never seen`` or ``revoked``.
        reason: why it is set aside or not eligible, or what its cap is too small for; empty otherwise.
    """

    device_id: str
    name: str
    device_class: str
    enrolled_s: float
    revoked_s: float | None
    seen_s: float | None
    cap_bytes: int | None
    example_count: int | None
    runtime_version: str | None = None
    state: str = ""
    reason: str = ""


class ReleaseSummary(Struct, frozen=True):
    """A release.

    Attributes:
        number: its number; higher ones are newer.
        run_id: id of the run that made the values.
        round: number of the round after which they stood.
        values_sha256: the values.
        lowest_accuracy: least share of right predictions on a device's own rows; None asks for none.
        highest_loss: largest mean cross-entropy there; None asks for none.
        published_s: moment when it was published, in seconds since 1970.
        devices: number of devices that have taken or refused it, or a newer one.
    """

    number: int
    run_id: str
    round: int
    values_sha256: str
    lowest_accuracy: float | None
    highest_loss: float | None
    published_s: float
    devices: int


class EventSummary(Struct, frozen=True):
    """One event.

    Attributes:
        event_id: number of the event; later events have larger ones.
        at_s: moment of the event, in seconds since 1970.
        round: number of the round that it belongs to, if any.
        device: name of the device that it belongs to, if any.
        task_id: id of the task that it belongs to, if any.
        code: word for programs; it never changes.
        message: text for people.
    """

    event_id: int
    at_s: float
    round: int | None
    device: str | None
    task_id: str | None
    code: str
    message: str


#: What events of trouble mean, in words.
TROUBLES = {
    "device_silent": "did not ask for the task in time",
    "device_late": "did not deliver in time",
    "device_lost": "said that it works, and then no more",
    "not_eligible": "may not work now, by its own conditions",
    "task_refused": "refused the task",
    "task_failed": "failed at the task",
    "task_untrusted": "did not trust the task",
    "out_of_memory": "ran out of memory",
    "plan_reduced": "ran out of memory once, and went on with a smaller plan",
    "cap_too_small": "has a cap that is too small for any task of this run",
    "device_set_aside": "was set aside by a run",
    "device_failed": "could not go on for its disk or its data",
    "result_left_out": "handed in a change too large for the round's mean",
    "release_refused": "refused a release",
    "release_untrusted": "did not trust a release",
    "round_abandoned": "the round was abandoned",
    "run_rolled_back": "the run was rolled back",
    "round_gated": "the round was committed and left the values as they were",
    "loss_flat": "the loss was flat along the last step, and the rate stayed",
    "evaluation_failed": "the evaluation failed",
}
#: A loss whose exponential is still a finite float.
LARGEST_LOSS = 700.0
#: States of a device that holds a place: it has not asked for it yet, or trains.
HELD = ("asked", "working")
#: Reasons of lapsed tasks that operators count as refused, and as failed.
REFUSED = frozenset({"task_refused", "cap_too_small", "not_eligible"})
FAILED = frozenset({"task_failed", "task_untrusted", "out_of_memory", "silent", "late", "lost", "revoked"})


def summarise(connection: Connection, run: Run, *, with_rounds: bool = True) -> RunSummary:
    """A run as it stands; read-only."""
    row = run_rows.get(connection, run.run_id)
    evaluations = {scores.round: scores for scores, _ in evaluation_rows.all_done(connection, run.run_id)}
    initial = evaluations.get(-1)
    devices = len(device_rows.not_set_aside(connection, run.run_id))
    rounds = []
    if with_rounds:
        rounds = [
            round_summary(connection, run.config, entry, evaluations.get(entry.round))
            for entry in round_rows.all_rounds(connection, run.run_id)
        ]
    return RunSummary(
        run_id=run.run_id,
        name=run.config.name,
        state=run.state,
        reason=row.reason,
        rounds_committed=row.rounds_done,
        rounds_wanted=(
            row.rounds_done
            if run.config.head == "closed_form" and row.state == "finished"
            else max(row.rounds_done, expected_rounds(run.config, devices))
        ),
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
        package_name=run.manifest.name,
        engines=list(run.manifest.engines),
        runtime_versions=device_rows.versions_in(connection, run.run_id),
        set_aside=[
            SetAside(row.device_name, row.at_s, row.reason)
            for row in set_aside_rows.of_run(connection, run.run_id)
        ],
        paused=run.paused,
        privacy=_privacy(connection, run),
        not_eligible=device_rows.count_not_eligible(connection),
        robustness=_robustness(connection, run, rounds) if with_rounds else None,
    )


def _robustness(connection: Connection, run: Run, rounds: list[RoundSummary]) -> Robustness | None:
    """Groups of rows at the start and at the last evaluation that counts; None before both are there."""
    evaluation, scores = run.config.evaluation, evaluation_rows.done(connection, run.run_id)
    if evaluation is None or not evaluation.groups or len(scores) < 2 or scores[0].round >= 0:
        return None
    before = evaluation_rows.groups_of(connection, run.run_id, scores[0].round)
    after = evaluation_rows.groups_of(connection, run.run_id, scores[-1].round)
    devices = {
        device
        for entry in rounds
        if entry.state == "committed" and not entry.rolled_back
        for device in entry.devices
        if device not in entry.left_out
    }
    groups = []
    for group in evaluation.groups:
        if (name := group.name) in before and name in after:
            took_part = any(fnmatchcase(device, pattern) for device in devices for pattern in group.devices)
            scored = (before[name].accuracy, after[name].accuracy)
            groups.append(GroupScore(name, took_part, after[name].rows, *scored))
    return robustness_of(groups)


def _privacy(connection: Connection, run: Run) -> PrivacySummary | None:
    privacy = run.config.privacy
    if privacy is None:
        return None
    so_far = privacy_rows.last(connection, run.run_id)
    at_end = privacy_rows.at_end(connection, run.run_id)
    return PrivacySummary(
        epsilon=0.0 if so_far is None else so_far.epsilon,
        participations=0 if so_far is None else so_far.participations,
        noise_multiplier=privacy.noise_multiplier or 0.0,
        epsilon_at_end=None if at_end is None else at_end.epsilon,
    )


def releases_of(connection: Connection) -> list[ReleaseSummary]:
    """All releases, oldest first."""
    return [
        ReleaseSummary(**vars(row), devices=release_rows.devices_at(connection, row.number))
        for row in release_rows.all_releases(connection)
    ]


def devices_of(
    stores: Stores, connection: Connection, *, now_s: float, device_id: str | None = None
) -> list[DeviceSummary]:
    """All devices that ever enrolled, by name, or the one with an id, and what may be expected of each at present."""
    standings = standings_of(stores, connection, now_s=now_s, device_id=device_id)
    return [_summary(row, *standing) for row, standing in standings]


def standings_of(
    stores: Stores, connection: Connection, *, now_s: float, device_id: str | None = None
) -> list[tuple[Row, tuple[str, str]]]:
    """The row of every device that ever enrolled, or of the one with an id, with its state and its reason."""
    runs = [_Asking(stores, connection, run) for run in active_runs(stores, connection)]
    return [(row, _standing(runs, row, now_s)) for row in device_rows.all_devices(connection, device_id)]


def _summary(row: Row, state: str, reason: str) -> DeviceSummary:
    kept = {name: row[name] for name in DeviceSummary.__struct_fields__[:-2]}
    return DeviceSummary(**kept, state=state, reason=reason)


class _Asking:
    """What a run that is going on has to do with devices, read once for all of them."""

    def __init__(self, stores: Stores, connection: Connection, run: Run) -> None:
        self._aside = set_aside_rows.reasons(connection, run.run_id)
        self._held = task_rows.open_states(connection, run.run_id)
        self._needed: dict[int, int] = {}
        self._stores, self._connection, self._run = stores, connection, run

    def standing(self, row: Row) -> tuple[str, str] | None:
        """What the run has to do with a device; None if it might ask it."""
        device_id = row["device_id"]
        if device_id in self._aside:
            return "set aside", self._aside[device_id]
        if device_id in self._held:
            return HELD[self._held[device_id] == "working"], ""
        rows = (row["example_count"] or 0) if self._run.visiting else 0
        if rows not in self._needed:
            self._needed[rows] = least_required_bytes(self._stores, self._connection, self._run, rows)
        needed = self._needed[rows]
        if needed > row["cap_bytes"]:
            return (
                "cap too small",
                f"run {self._run.run_id} needs {needed} bytes, the cap is {row['cap_bytes']}",
            )
        return None


def _standing(runs: list[_Asking], row: Row, now_s: float) -> tuple[str, str]:
    """A device's state and its reason."""
    if row["revoked_s"] is not None:
        return "revoked", ""
    if row["seen_s"] is None:
        return "never seen", ""
    standings = [run.standing(row) for run in runs]
    held = (standing for standing in standings if standing is not None and standing[0] in HELD)
    standing = next(held, None)
    if standing is None and standings and None not in standings:  # no run asks it
        standing = standings[0]
    if standing is not None and standing[0] != "cap too small":
        return standing
    if now_s > row["expected_s"] + SLACK_S:
        return "silent", ""
    if row["not_eligible"]:
        return "not eligible", row["not_eligible"]
    return standing or ("ready", "")


def events_of(connection: Connection, run_id: str, after: int, limit: int) -> list[EventSummary]:
    """Events of a run, and those of no run, with an id above ``after``, oldest first, at most ``limit``."""
    rows = event_rows.of_run(connection, run_id, after=after, limit=limit)
    return [EventSummary(**row) for row in rows]


def round_summary(
    connection: Connection, config: RunConfig, row: RoundRow, evaluation: Scores | None
) -> RoundSummary:
    """One round as it stands, as far as reports of its run may show it."""
    return _shown(_round(connection, row, evaluation), config)


def _round(connection: Connection, row: RoundRow, evaluation: Scores | None) -> RoundSummary:
    tasks = task_rows.outcomes(connection, row.run_id, row.round)
    results = result_rows.of_round(connection, row.run_id, row.round)
    names = result_rows.devices_of(connection, row.run_id, row.round)
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
        devices=[names[result.task_id] for result in results],
        results=len(results),
        refused=sum(task.reason in REFUSED for task in tasks),
        failed=sum(task.reason in FAILED for task in tasks),
        examples=examples,
        perplexity=_perplexity(evaluation),
        gated=bool(row.gated),
        caps_bytes=sorted({memory.cap_bytes for memory in memories}),
        bytes_up_per_task=sum(r.change_bytes for r in results) / len(results) if results else None,
        left_out=[names[result.task_id] for result in results if result.left_out],
        scores={names[r.task_id]: r.score for r in results if r.score is not None},
        rolled_back=row.rolled_back_s is not None,
    )


def _shown(entry: RoundSummary, config: RunConfig) -> RoundSummary:
    """A round as reports show it: figures of fewer devices than the run shows are left out, and so are single devices'.

    What devices trained on is nobody's business where noise or masks hide it: loss and examples are left out then.
    """
    hidden: dict[str, Any] = {}
    if config.privacy is not None or config.secure_aggregation:
        hidden = {"train_loss": None, "examples": 0, "scores": {}}
    if config.shown_group > 1:
        hidden["scores"] = {}
    if entry.results < config.shown_group:
        hidden |= {
            "train_loss": None,
            "examples": 0,
            "predicted_peak_bytes": None,
            "measured_peak_bytes": None,
            "caps_bytes": [],
            "bytes_up_per_task": None,
        }
    return structs.replace(entry, **hidden)


def _perplexity(evaluation: Scores | None) -> float | None:
    """Exponential of the mean loss over tokens; None if no such loss was measured, or it is too large for a number."""
    if evaluation is None or not evaluation.tokens or evaluation.mean_loss > LARGEST_LOSS:
        return None
    return math.exp(evaluation.mean_loss)
