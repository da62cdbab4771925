"""The global model meets the coordinator's own development rows, in the same runtime that the devices use.

Evaluations wait in the database and run one at a time beside the rounds; a run is finished once its last
one is stored.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from coordinator.events import record
from coordinator.rounds.runs import Run, end_run, reason_of_end, run_of
from coordinator.storage import evaluation_rows, run_rows
from coordinator.storage.connection import Connection
from coordinator.storage.evaluation_rows import GroupAccuracy
from coordinator.storage.stores import Stores
from edge_runtime.errors import DigestError, EdgeError, WorkerError
from edge_runtime.package.prepared import is_current
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, Job, OutcomeT, PrepareJob, PrepareOutcome
from edge_runtime.worker.process import finish_worker, start_worker

#: The "round" of the evaluation of the values a run starts from.
INITIAL = -1


@dataclass(frozen=True)
class Evaluation:
    """One evaluation to be made.

    Attributes:
        run_id: id of the run.
        round: number of the round whose values are evaluated, or :data:`INITIAL`.
        job: the evaluation, as the worker takes it.
        prepare: job that lays the package out first, if that was not done yet.
        groups: the same evaluation on the rows of each group.
    """

    run_id: str
    round: int
    job: EvaluateJob
    prepare: PrepareJob
    groups: dict[str, EvaluateJob] = field(default_factory=dict)


def next_evaluation(stores: Stores) -> Evaluation | None:
    """The oldest evaluation that is waiting, ready to run; its package folder exists on return."""
    with stores.storage.reading() as connection:
        pending = evaluation_rows.first_pending(connection)
        if pending is None:
            return None
        run = run_of(stores, run_rows.get(connection, pending.run_id))
    return evaluation_of(stores, run, pending.round, pending.values_sha256)


def evaluation_of(stores: Stores, run: Run, number: int, values_sha256: str) -> Evaluation | None:
    """The evaluation of a run's values, ready to run; its package folder exists on return. None if it makes none.

    Args:
        stores: handles on the state folder.
        run: the run.
        number: number of the round that the values stood after, or :data:`INITIAL`.
        values_sha256: digest of the values, which are among the blobs.
    """
    if run.config.evaluation is None:
        return None
    folder = _package_folder(stores, run.package_sha256, run.package_signature)
    job = EvaluateJob(
        package_folder=str(folder),
        package_sha256=run.package_sha256,
        prepared_folder=str(stores.folder / "prepared" / run.package_sha256),
        state_path=str(stores.blobs.find(values_sha256)),
        data_path=run.config.evaluation.data,
        sequence_limit=min(run.config.sequence_limit, run.manifest.sequence_limit),
        cap_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        threads=run.config.evaluation.threads,
        features=run.config.features,
        pooling=run.config.pooling,
    )
    prepare = PrepareJob(
        job.package_folder,
        job.package_sha256,
        job.prepared_folder,
        job.cap_bytes,
        job.threads,
        run.config.evaluation.arithmetic,
    )
    groups = {
        group.name: msgspec.structs.replace(job, data_path=group.data)
        for group in run.config.evaluation.groups
    }
    return Evaluation(run.run_id, number, job, prepare, groups)


async def evaluate(evaluation: Evaluation) -> EvaluateOutcome | EdgeError:
    """Make an evaluation in a child process; a failure is an outcome too, for it must not stop the rounds.

    If the caller is cancelled, the child is killed and the evaluation stays pending.
    """
    prepare = evaluation.prepare
    try:
        if not is_current(Path(prepare.prepared_folder), prepare.package_sha256, prepare.arithmetic):
            await _run(prepare, PrepareOutcome)
        return await _run(evaluation.job, EvaluateOutcome)
    except EdgeError as error:
        return error
    except OSError as error:
        return WorkerError(f"the evaluation worker did not start: {error}")


async def evaluate_groups(evaluation: Evaluation) -> dict[str, GroupAccuracy] | EdgeError:
    """Evaluate on the rows of each group, one after another; of several failures the first is the outcome."""
    found = {}
    for name, job in evaluation.groups.items():
        outcome = await evaluate(replace(evaluation, job=job))
        if isinstance(outcome, EdgeError):
            return outcome
        found[name] = GroupAccuracy(outcome.rows, outcome.accuracy)
    return found


async def _run(job: Job, outcome: type[OutcomeT]) -> OutcomeT:
    """A worker's outcome; the worker is killed if the caller is cancelled."""
    process = await asyncio.to_thread(start_worker, job)
    try:
        return await asyncio.to_thread(finish_worker, process, outcome)
    except asyncio.CancelledError:
        process.kill()
        raise


def store_evaluation(
    connection: Connection,
    evaluation: Evaluation,
    outcome: EvaluateOutcome | EdgeError,
    groups: dict[str, GroupAccuracy] | EdgeError | None = None,
    *,
    now_s: float,
) -> None:
    """Store an outcome, and those of the groups; if it was the last that the run waited for, the run is finished."""
    run_id, number = evaluation.run_id, evaluation.round
    if isinstance(outcome, EdgeError) or isinstance(groups, EdgeError):
        failed = outcome if isinstance(outcome, EdgeError) else groups
        message = f"{type(failed).__name__}: {failed}"
        evaluation_rows.store_failed(connection, run_id, number, message)
        record(connection, now_s, "evaluation_failed", message, run_id=run_id, round_number=number)
    else:
        evaluation_rows.store_done(
            connection,
            run_id,
            number,
            rows=outcome.rows,
            accuracy=outcome.accuracy,
            mean_loss=outcome.mean_loss,
            seconds=outcome.seconds,
            tokens=outcome.tokens,
            groups=groups or {},
        )
    run = run_rows.get(connection, run_id)
    if run.state == "evaluating" and not evaluation_rows.has_pending(connection, run_id):
        end_run(connection, run_id, "finished", reason_of_end(run.phase), now_s=now_s)


def _package_folder(stores: Stores, package_sha256: str, signature: str) -> Path:
    """The imported package as a folder again: hard links to the blobs, no second copy."""
    folder = stores.folder / "packages" / package_sha256
    manifest = stores.manifest(package_sha256)
    wanted = {"manifest.json": package_sha256, **{name: e.sha256 for name, e in manifest.files.items()}}
    for name, sha256 in wanted.items():
        link = folder / name
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = stores.blobs.find(sha256)
            if blob is None:
                raise DigestError(
                    f"blob {sha256} of package {package_sha256} is missing; restore it from a backup"
                )
            link.hardlink_to(blob)
    (folder / "manifest.sig").write_text(signature + "\n", "ascii")
    return folder
