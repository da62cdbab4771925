"""What an arm did, as ``DIR/arms/ARM-seedN.json``: written whole when it ends, readable by anybody after."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import msgspec
from msgspec import Struct

from coordinator.config import RunConfig
from coordinator.rounds.robustness import Robustness
from coordinator.rounds.runs import find_run
from coordinator.rounds.summary import RoundSummary, summarise
from coordinator.simulation.arm import Arm
from coordinator.simulation.config import NO_KEY
from coordinator.simulation.cost import forward_passes_per_example
from coordinator.simulation.verdict import Ending, Status
from coordinator.storage import round_rows, simulation_rows
from coordinator.storage.simulation_rows import ResultWork
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import write_durably
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest, TaskKind
from edge_runtime.protocol.messages import Task

ARMS = "arms"


class Point(Struct, frozen=True):
    """The global model after a round, and what it took to get there.

    Attributes:
        round: number of the round; -1 is where the arm began.
        accuracy: accuracy on the dev rows; for language modelling, the share of next tokens predicted right.
        loss: mean loss on the dev rows; for language modelling, over their tokens.
        perplexity: exponential of the loss, for language modelling alone.
        forward_passes: passes of one example through the model so far, by all devices whose results counted.
        bytes_up: bytes that devices sent so far.
        bytes_down: bytes that devices got so far.
        virtual_s: seconds on the simulated clock.
        wall_s: seconds that the simulation itself took so far.
        train_loss: mean loss over the round's examples, reported by the devices.
        devices: names of the devices whose results counted.
    """

    round: int
    accuracy: float | None
    loss: float | None
    perplexity: float | None
    forward_passes: int
    bytes_up: int
    bytes_down: int
    virtual_s: float
    wall_s: float
    train_loss: float | None = None
    devices: tuple[str, ...] = ()


class Record(Struct, frozen=True):
    """One arm at one seed.

    Attributes:
        arm: name of the arm.
        kind: a few words for people.
        seed: seed of the arm.
        status: finished, diverged or failed.
        round: last round whose values were in use, for an arm that diverged.
        reason: reason why it diverged or failed; empty if it finished.
        task: task of the package.
        package: digest of the package's manifest.
        fingerprint: digest of all that the values depend on.
        threads: threads of the engine; equal seeds give equal bits at an equal number.
        rounds: number of committed rounds.
        tasks: number of tasks that were handed out.
        results: number of results that counted.
        schedule_sha256: digest of which device held which slot, and what became of it.
        values_sha256: digest of the slice values at the end, which lie in the arm's state folder under this name.
        points: evaluated rounds, in order.
        config: configuration of the run, with the package folder that the arm names; None for an arm that failed.
        robustness: scores over groups of dev rows by owner; None where dev or training rows have no owners.
    """

    arm: str
    kind: str
    seed: int
    status: Status
    round: int | None
    reason: str
    task: TaskKind
    package: str
    fingerprint: str
    threads: int
    rounds: int
    tasks: int
    results: int
    schedule_sha256: str
    values_sha256: str
    points: tuple[Point, ...]
    config: RunConfig | None
    robustness: Robustness | None = None


def record_of(arm: Arm, ending: Ending, threads: int, robustness: Robustness | None = None) -> Record:
    """The record of an arm that has ended, from its database."""
    with arm.stores.storage.reading() as connection:
        run = find_run(arm.stores, connection, arm.run_id)
        summary = summarise(connection, run)
        rounds = round_rows.all_rounds(connection, arm.run_id)
        closed = {row.round: row.closed_s for row in rounds if row.closed_s is not None}
        passes = _passes(simulation_rows.work_of_results(connection), run.manifest)
        return Record(
            arm=arm.config.name,
            kind=arm.config.kind,
            seed=arm.seed,
            status=ending.status,
            round=ending.round,
            reason=ending.reason,
            task=run.manifest.task,
            package=run.package_sha256,
            fingerprint=arm.fingerprint,
            threads=threads,
            rounds=summary.rounds_committed,
            tasks=simulation_rows.count_handed_out(connection),
            results=simulation_rows.count_results(connection),
            schedule_sha256=_schedule_sha256(simulation_rows.schedule(connection)),
            values_sha256=run.values_sha256,
            points=(
                *_first(summary.initial_accuracy, summary.initial_loss, summary.initial_perplexity, arm),
                *_points(summary.rounds, closed, passes, arm.wall_of_rounds()),
            ),
            config=msgspec.structs.replace(run.config, package=arm.config.package, publisher_key=NO_KEY),
            robustness=robustness,
        )


def failed(arm: str, kind: str, seed: int, reason: str, threads: int) -> Record:
    """The record of an arm that an error stopped."""
    return Record(
        arm, kind, seed, "failed", None, reason, "classification", "", "", threads, 0, 0, 0, "", "", (), None
    )


def write_record(folder: Path, record: Record) -> None:
    """Write a record below the output folder."""
    path = path_of(folder, record.arm, record.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def path_of(folder: Path, arm: str, seed: int) -> Path:
    """Where an arm's record lies."""
    return folder / ARMS / f"{arm}-seed{seed}.json"


def read_record(path: Path) -> Record | None:
    """A record, or None if there is none.

    Raises:
        ConfigError: the file is no record.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, *MALFORMED) as error:
        raise ConfigError(
            f"{path} is no record of an arm: {error}; remove it and simulate the arm again"
        ) from error


def read_records(folder: Path) -> list[Record]:
    """All records below an output folder, by arm and seed."""
    found = [read_record(path) for path in sorted((folder / ARMS).glob("*.json"))]
    return sorted((r for r in found if r is not None), key=lambda record: (record.arm, record.seed))


def _first(
    accuracy: float | None, loss: float | None, perplexity: float | None, arm: Arm
) -> tuple[Point, ...]:
    if loss is None:
        return ()
    return (Point(-1, accuracy, loss, perplexity, 0, 0, 0, 0.0, arm.wall_of_rounds().get(-1, 0.0)),)


def _points(
    rounds: list[RoundSummary],
    closed: dict[int, float],
    passes: dict[int, float],
    wall: dict[int, float],
) -> list[Point]:
    """One for each evaluated round; costs add up over all rounds, abandoned ones too."""
    points = []
    done = 0.0
    up = down = 0
    for entry in rounds:
        done += passes.get(entry.round, 0)
        up += entry.bytes_up
        down += entry.bytes_down
        if entry.loss is None:
            continue
        points.append(
            Point(
                round=entry.round,
                accuracy=entry.accuracy,
                loss=entry.loss,
                perplexity=entry.perplexity,
                forward_passes=round(done),
                bytes_up=up,
                bytes_down=down,
                virtual_s=closed[entry.round],
                wall_s=wall.get(entry.round, 0.0),
                train_loss=entry.train_loss if _is_finite(entry.train_loss) else None,
                devices=tuple(entry.devices),
            )
        )
    return points


def _passes(results: list[ResultWork], manifest: Manifest) -> dict[int, float]:
    """Forward passes of each round's counted results; steps that could not be applied cost as much as others."""
    passes: dict[int, float] = {}
    for work in results:
        task = msgspec.json.decode(work.task, type=Task)
        examples = work.steps * min(task.batch_size, work.example_count)
        if work.estimator is not None:
            task = msgspec.structs.replace(task, update=work.estimator, draws=max(1, work.draws))
        each = forward_passes_per_example(task, manifest)
        passes[work.round] = passes.get(work.round, 0) + examples * each
    return passes


def _schedule_sha256(schedule: list[tuple[int, int, int, str, str, str]]) -> str:
    """Who held which slot, attempt by attempt, and how it ended; times play no part, for arms differ in speed."""
    digest = hashlib.sha256()
    for entry in schedule:
        digest.update(msgspec.json.encode(entry) + b"\n")
    return digest.hexdigest()


def _is_finite(number: float | None) -> bool:
    return number is not None and math.isfinite(number)
