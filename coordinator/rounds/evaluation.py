"""The global model meets the coordinator's own development rows, in the same runtime the devices use.

Evaluations wait in the database and run one at a time beside the rounds; a run is finished once its last
one is stored.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from coordinator.events import record
from coordinator.rounds.runs import end_run, run_of
from coordinator.storage.stores import Stores
from edge_runtime.errors import EdgeError, WorkerError
from edge_runtime.package.prepared import is_current
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, Job, OutcomeT, PrepareJob, PrepareOutcome
from edge_runtime.worker.process import finish_worker, start_worker

#: The "round" of the evaluation of the values a run starts from.
INITIAL = -1


@dataclass(frozen=True)
class Evaluation:
    """One evaluation to be made; ``prepare`` lays the package out first, if need be."""

    run_id: str
    round: int
    job: EvaluateJob
    prepare: PrepareJob


def enqueue(connection: sqlite3.Connection, run_id: str, round_number: int, values_sha256: str) -> None:
    """Ask for an evaluation of the values after a round, within the transaction that made them."""
    connection.execute(
        "INSERT INTO evaluations (run_id, round, values_sha256, state) VALUES (?, ?, ?, 'pending')",
        (run_id, round_number, values_sha256),
    )


def next_evaluation(stores: Stores) -> Evaluation | None:
    """The oldest evaluation that is waiting, ready to run; its package folder exists on return."""
    with stores.storage.reading() as connection:
        row = connection.execute(
            "SELECT evaluations.round AS after_round, evaluations.values_sha256 AS evaluated, runs.*"
            " FROM evaluations JOIN runs USING (run_id) WHERE evaluations.state = 'pending'"
            " ORDER BY position, after_round LIMIT 1"
        ).fetchone()
        run = None if row is None else run_of(stores, row)
    if run is None or run.config.evaluation is None:
        return None
    folder = _package_folder(stores, run.package_sha256, run.package_signature)
    job = EvaluateJob(
        package_folder=str(folder),
        package_sha256=run.package_sha256,
        prepared_folder=str(stores.folder / "prepared" / run.package_sha256),
        state_path=str(stores.blobs.find(row["evaluated"])),
        data_path=run.config.evaluation.data,
        sequence_limit=min(run.config.sequence_limit, run.manifest.sequence_limit),
        cap_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        threads=run.config.evaluation.threads,
    )
    prepare = PrepareJob(
        job.package_folder,
        job.package_sha256,
        job.prepared_folder,
        job.cap_bytes,
        job.threads,
        run.config.evaluation.arithmetic,
    )
    return Evaluation(run.run_id, row["after_round"], job, prepare)


async def evaluate(evaluation: Evaluation) -> EvaluateOutcome | EdgeError:
    """Run it in a child process; a failure is an outcome too, for it must not stop the rounds.

    If the waiting task is cancelled, the child is killed and the evaluation stays pending.
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


async def _run(job: Job, outcome: type[OutcomeT]) -> OutcomeT:
    """A worker's outcome; the worker is killed if the waiting task is cancelled."""
    process = await asyncio.to_thread(start_worker, job)
    try:
        return await asyncio.to_thread(finish_worker, process, outcome)
    except asyncio.CancelledError:
        process.kill()
        raise


def store_evaluation(
    connection: sqlite3.Connection,
    evaluation: Evaluation,
    outcome: EvaluateOutcome | EdgeError,
    *,
    now_s: float,
) -> None:
    """Store an outcome; if the run has waited for it alone, the run is finished."""
    key = (evaluation.run_id, evaluation.round)
    if isinstance(outcome, EdgeError):
        message = f"{type(outcome).__name__}: {outcome}"
        connection.execute(
            "UPDATE evaluations SET state = 'failed', message = ? WHERE run_id = ? AND round = ?",
            (message, *key),
        )
        record(connection, now_s, "evaluation_failed", message, run_id=key[0], round_number=key[1])
    else:
        connection.execute(
            "UPDATE evaluations SET state = 'done', rows = ?, accuracy = ?, mean_loss = ?, seconds = ?, tokens = ?"
            " WHERE run_id = ? AND round = ?",
            (outcome.rows, outcome.accuracy, outcome.mean_loss, outcome.seconds, outcome.tokens, *key),
        )
    waiting = connection.execute(
        "SELECT 1 FROM evaluations WHERE run_id = ? AND state = 'pending'", (evaluation.run_id,)
    ).fetchone()
    state = connection.execute("SELECT state FROM runs WHERE run_id = ?", (evaluation.run_id,)).fetchone()[
        "state"
    ]
    if state == "evaluating" and waiting is None:
        end_run(connection, evaluation.run_id, "finished", "all rounds committed", now_s=now_s)


def _package_folder(stores: Stores, package_sha256: str, signature: str) -> Path:
    """The imported package as a folder again: hard links to the blobs, no second copy."""
    folder = stores.folder / "packages" / package_sha256
    manifest = stores.manifest(package_sha256)
    wanted = {"manifest.json": package_sha256, **{name: e.sha256 for name, e in manifest.files.items()}}
    for name, sha256 in wanted.items():
        link = folder / name
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(stores.folder / "blobs" / sha256[:2] / sha256)
    (folder / "manifest.sig").write_text(signature + "\n", "ascii")
    return folder
