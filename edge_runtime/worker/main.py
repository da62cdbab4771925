"""The worker process: one job in, one outcome out (see :mod:`edge_runtime.worker.jobs`).

Training a task is :func:`train`, readable top to bottom; evaluation is :func:`evaluate`, preparing a package
:func:`prepare_package`.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge_runtime.data.batches import Tokenizer, load_rows
from edge_runtime.data.examples import Examples
from edge_runtime.data.rows import summarise_rows
from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import write_durably
from edge_runtime.engines.choice import engine_maker
from edge_runtime.engines.engine import Engine
from edge_runtime.errors import WorkerError
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prefix_cache import PrefixCache
from edge_runtime.execution.prepare import prepare
from edge_runtime.memory.allocator import keep_freed_memory, release_library_code, return_freed_memory
from edge_runtime.memory.best_estimator import USABLE_TIME, StepLimits, best_plan
from edge_runtime.memory.meter import Meter, proportional_bytes, status_bytes
from edge_runtime.memory.plan import PeakPrediction, Plan, Planner
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, decode_values
from edge_runtime.protocol.messages import MemoryReport
from edge_runtime.training.estimators import executor_of
from edge_runtime.training.evaluation import score
from edge_runtime.training.loop import count_steps
from edge_runtime.training.methods import check_method, measures_line
from edge_runtime.training.progress import Keeper
from edge_runtime.worker.ending import end_of, write_line
from edge_runtime.worker.jobs import (
    CountJob,
    CountOutcome,
    EvaluateJob,
    EvaluateOutcome,
    Job,
    PhaseEntered,
    PrepareJob,
    PrepareOutcome,
    TrainJob,
    TrainOutcome,
)
from edge_runtime.worker.memory_breakdown import MemoryBreakdown
from edge_runtime.worker.rows_to_sum import RowsToSum
from edge_runtime.worker.session import TaskSession, evaluate_outcome, evaluation_work, train_outcome
from edge_runtime.worker.stopping import told_to_stop

log = logging.getLogger(__name__)


def train(job: TrainJob, meter: Meter) -> TrainOutcome:
    """Take a task's local steps and write the change to ``job.delta_path``.

    Raises:
        CapExceededError: no plan fits the cap; has both figures.
        ConfigError: settings of the task exclude each other or do not suit the package
            (:mod:`edge_runtime.training.methods`).
        EdgeError: package, values or data cannot be used.
    """
    task, started, engine = job.task, time.monotonic(), engine_maker(job.engine)(job.threads)
    check_method(task)  # the agent checked it too, but any JSON may arrive on standard input

    # 1. Open what the task names; everything is verified before it is used.
    meter.enter("load")
    breakdown = MemoryBreakdown(meter.floor_bytes, (Path(job.package_folder), Path(job.prepared_folder)))
    prepared, values, examples = _load(job, engine, task.sequence_limit)
    breakdown.tokenised()
    rows = RowsToSum(job, prepared.manifest, examples)
    session = TaskSession.open(task, prepared.manifest, values, rows.examples, _reference(job))

    # 2. Choose a plan that fits, or refuse with numbers.
    plan = _plan(job, session, _planner(prepared, meter))
    session = session.settled(plan)
    with _prefix_cache(job, session) as cache:
        spill_folder = Path(job.delta_path).parent if plan.choice.inputs == "disk" else None
        executor = executor_of(session.task, prepared, engine, plan.choice, cache, spill_folder)
        release_library_code()
        breakdown.loaded(executor)

        # 3. Local steps.
        meter.enter("step")
        with told_to_stop() as stops:
            keeper = _keeper(job, session, (plan.choice, executor.arithmetic, engine.version), stops)
            trained = session.train(executor, plan.choice, breakdown.stepped, keeper, rows.enter)
        bins = breakdown.bins(values)
        proportional_anonymous_bytes, proportional_file_bytes = proportional_bytes()

        # 4. Hand over the delta.
        meter.enter("serialise")
        write_durably(Path(job.delta_path), session.encode(trained, secrets.token_bytes(32)))
        rows.write()
        meter.close()
        return msgspec.structs.replace(
            train_outcome(
                trained, plan, time.monotonic() - started, _report(meter, plan.peak, job.cap_bytes)
            ),
            bins=bins,
            steps=breakdown.steps,
            prefix_hits=cache.hits if cache else 0,
            prefix_misses=cache.misses if cache else 0,
            proportional_anonymous_bytes=proportional_anonymous_bytes,
            proportional_file_bytes=proportional_file_bytes,
            weights_read_bytes=executor.weights_read_bytes,
            draws_run=executor.draws_run,
            draws_skipped=executor.draws_skipped,
            stands=rows.stands,
        )


def evaluate(job: EvaluateJob, meter: Meter) -> EvaluateOutcome:
    """Accuracy and mean loss of the given values over a data file, by the primal programs alone.

    Both are over rows for classification, over predicted tokens for language modelling.
    """
    started, engine = time.monotonic(), engine_maker(job.engine)(job.threads)
    meter.enter("load")
    breakdown = MemoryBreakdown(meter.floor_bytes, (Path(job.package_folder), Path(job.prepared_folder)))
    prepared, values, examples = _load(job, engine, job.sequence_limit)
    plan = _planner(prepared, meter).choose(evaluation_work(examples), job.cap_bytes)
    executor = Executor(prepared, engine, (), plan.choice.weights)
    release_library_code()

    meter.enter("evaluate")
    scores = score(executor, values, examples, plan.choice.micro_batch, breakdown.stepped)
    meter.close()
    memory = _report(meter, plan.peak, job.cap_bytes)
    outcome = evaluate_outcome(
        scores, prepared.manifest, len(examples.ids), time.monotonic() - started, memory
    )
    return msgspec.structs.replace(outcome, steps=breakdown.steps)


def prepare_package(job: PrepareJob, meter: Meter) -> PrepareOutcome:
    """Prepare a package for this machine."""
    started = time.monotonic()
    meter.enter("prepare")
    package = Package.open_known(Path(job.package_folder), job.package_sha256).for_engine(job.engine)
    engine = engine_maker(job.engine)(job.threads)
    folder = Path(job.prepared_folder)
    prepared = prepare(package, folder, engine, job.arithmetic, job.cap_bytes).prepared
    meter.close()
    return PrepareOutcome(
        arithmetic=prepared.arithmetic,
        candidates=prepared.candidates,
        seconds=time.monotonic() - started,
        memory=MemoryReport(0, meter.peak_bytes, job.cap_bytes, phases=meter.phases),
    )


def count(job: CountJob, meter: Meter) -> CountOutcome:
    """Read all rows of a device, by whatever its operator wrote to give them."""
    meter.enter("read")
    found = summarise_rows(Path(job.data_path), job.reading)
    meter.close()
    memory = MemoryReport(0, meter.peak_bytes, job.cap_bytes, phases=meter.phases)
    return CountOutcome(found.rows, found.labelled, found.numbered, found.unused_columns, memory)


def run(
    job: Job, announce: Callable[[str], None] | None = None
) -> TrainOutcome | EvaluateOutcome | PrepareOutcome | CountOutcome:
    """Do one job in this process.

    Args:
        job: the job.
        announce: function that is called with the name of each phase as it begins; None calls nothing.
    """
    keep_freed_memory()
    if isinstance(job, CountJob):
        return count(job, Meter(announce))
    engine_maker(job.engine)  # its library is part of the floor
    meter = Meter(announce)
    if isinstance(job, TrainJob):
        return train(job, meter)
    return evaluate(job, meter) if isinstance(job, EvaluateJob) else prepare_package(job, meter)


def main() -> int:
    """Read a job from standard input, do it, and write phases and outcome to standard output."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    return end_of(lambda: write_line(run(_read_job(sys.stdin.buffer.read()), _announce)))


def _read_job(data: bytes) -> Job:
    try:
        job: Job = msgspec.json.decode(data, type=Job)
    except MALFORMED as error:
        raise WorkerError(f"malformed job: {error}") from error
    return job


def _announce(phase: str) -> None:
    write_line(PhaseEntered(phase))


def _load(
    job: TrainJob | EvaluateJob, engine: Engine, sequence_limit: int
) -> tuple[PreparedPackage, Values, Examples]:
    """Package, slice values and tokenised rows of a job. The tokenizer is gone before any program is loaded."""
    package = Package.open_known(Path(job.package_folder), job.package_sha256).for_engine(job.engine)
    prepared = PreparedPackage.open(package, Path(job.prepared_folder), engine.version)
    head = job.task if isinstance(job, TrainJob) else job
    prepared = prepared.with_head(head.features, head.pooling)
    if isinstance(job, TrainJob):
        prepared = prepared.with_rank(job.task.rank)
    manifest = prepared.manifest
    values = decode_values(_read(job.state_path, "slice values"), manifest.slices)
    # A device whose owner has removed all rows still takes its sums off.
    gone = isinstance(job, TrainJob) and job.handed_in is not None
    rows = load_rows(Path(job.data_path), manifest.labels, job.reading, may_be_empty=gone)
    limit = min(sequence_limit, manifest.sequence_limit)
    release_library_code()  # imports have run
    predicts_text = manifest.task == "causal_lm"
    ids = Tokenizer(package.path(manifest.tokenizer), limit).encode(rows, 2 if predicts_text else 1)
    return_freed_memory()
    release_library_code()
    labels = None if predicts_text else [row.label for row in rows]
    return prepared, values, Examples(ids, labels, manifest.pad_token_id, limit)


def _plan(job: TrainJob, session: TaskSession, planner: Planner) -> Plan:
    """The plan of a task: as the job says, or the best one that fits."""
    if job.choice:
        return planner.plan(session.work, job.choice)
    budget_bytes = job.budget_bytes or job.cap_bytes
    if session.work.update != "best":
        return planner.choose(session.work, budget_bytes)
    steps = count_steps(job.task, len(session.examples.ids))
    limits = StepLimits(
        USABLE_TIME * job.task.deadline_s / steps if job.task.deadline_s else None,
        shutil.disk_usage(Path(job.delta_path).parent).free,
    )
    plan = best_plan(planner, session.work, budget_bytes, limits)
    log.info("event=estimator_chosen task=%s reason=%s", job.task.task_id, plan.reason)
    return plan


def _planner(prepared: PreparedPackage, meter: Meter) -> Planner:
    stored = prepared.prepared
    return Planner(prepared.manifest, stored.arithmetic, meter.floor_bytes, stored.calibration)


def _keeper(
    job: TrainJob, session: TaskSession, how: tuple[object, ...], stops: Callable[[], bool]
) -> Keeper | None:
    """What keeps the task's progress; None if the job names no place for it.

    Args:
        job: the job.
        session: the task.
        how: all that decides about the outcome's bits beside the task and its rows.
        stops: function that says whether the process was told to stop.
    """
    return Keeper(Path(job.progress_path), session.digest(*how), stops) if job.progress_path else None


def _reference(job: TrainJob) -> bytes | None:
    """Bytes of what the task's directions are compared with, or of its line; None if there are none yet."""
    task = job.task
    if task.reference is None or not (task.directions == "filtered" or measures_line(task)):
        return None
    if not job.reference_path:
        raise WorkerError(f"task {task.task_id} names a reference, and the job has no file of it")
    return _read(job.reference_path, "reference")


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise WorkerError(f"cannot read the {what} {path}: {error.strerror}") from error


@contextmanager
def _prefix_cache(job: TrainJob, session: TaskSession) -> Iterator[PrefixCache | None]:
    """A prefix cache; None where there is nothing to keep or no room for it."""
    if not session.repeats_a_prefix or job.prefix_cache_bytes == 0:
        yield None
        return
    with PrefixCache(Path(job.delta_path).parent, job.prefix_cache_bytes) as cache:
        yield cache


def _report(meter: Meter, prediction: PeakPrediction, cap_bytes: int) -> MemoryReport:
    return MemoryReport(
        predicted_peak_bytes=prediction.total_bytes,
        high_water_bytes=meter.peak_bytes,
        cap_bytes=cap_bytes,
        anonymous_bytes=status_bytes("RssAnon"),
        file_bytes=status_bytes("RssFile"),
        floor_bytes=meter.floor_bytes,
        phases=meter.phases,
    )


if __name__ == "__main__":
    raise SystemExit(main())
