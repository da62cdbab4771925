"""The worker process: one job in, one outcome out (see ``edge_runtime.jobs``).

Training a task is :func:`train`, readable top to bottom; evaluation is :func:`evaluate`.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.data import Tokenizer, draw_batches, load_rows
from edge_runtime.durable import write_durably
from edge_runtime.enforcement import ran_out_of_memory
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.errors import CapExceededError, EdgeError, OutOfMemoryError, WorkerError
from edge_runtime.executor import Executor, first_dual_segment
from edge_runtime.jobs import (
    FAILURE_EXIT_CODE,
    EvaluateJob,
    EvaluateOutcome,
    Job,
    PhaseEntered,
    TrainJob,
    TrainOutcome,
    describe_failure,
)
from edge_runtime.messages import MemoryReport
from edge_runtime.meter import Meter, status_bytes
from edge_runtime.optimizers import make_optimizer
from edge_runtime.package import Package
from edge_runtime.plan import PeakPrediction, largest_micro_batch, preferred_micro_batch
from edge_runtime.slices import Values, decode_values, encode_values, shapes
from edge_runtime.step import Examples, group_by_length, take_step

log = logging.getLogger(__name__)

#: mallopt(3)'s option numbers.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def train(job: TrainJob, meter: Meter) -> TrainOutcome:
    """Run a task's local steps and write the change of its slices to ``job.change_path``.

    Raises:
        CapExceededError: no micro-batch fits the cap, with both figures.
        EdgeError: package, state or data cannot be used.
    """
    task, started, floor = job.task, time.monotonic(), status_bytes("VmRSS")

    # 1. Open what the task names; everything is verified before it is used.
    meter.enter("load")
    package, values, examples = _load(job, task.sequence_limit)
    specs = [package.manifest.slice_named(name) for name in task.slices]
    heads = [package.manifest.head] if task.train_head else []

    # 2. Choose a micro-batch that fits the cap, or refuse with numbers.
    micro_batch, prediction = largest_micro_batch(
        package.manifest,
        job.cap_bytes,
        first_segment=first_dual_segment(package, task.slices),
        batch_size=task.batch_size,
        sequence=max(map(len, examples.ids)),
        draws=task.draws,
        floor_bytes=floor,
    )
    _admit(prediction, job.cap_bytes)
    executor = Executor(package, OnnxEngine(job.threads), task.slices)

    # 3. Local steps.
    meter.enter("step")
    optimizer = make_optimizer(task.optimizer, values, list(shapes([*specs, *heads])))
    batches = draw_batches(
        len(examples.ids),
        seed=task.seed,
        round_number=task.round,
        slot=task.slot,
        steps=task.steps,
        batch_size=task.batch_size,
    )
    applied, seen, loss_sum = 0, 0, 0.0
    for number, chosen in enumerate(batches):
        step = take_step(executor, task, number, specs, optimizer.values(), examples, chosen, micro_batch)
        if step is None:
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, number)
            continue
        optimizer.step(step.gradient)
        applied, seen, loss_sum = applied + 1, seen + len(chosen), loss_sum + step.loss_sum

    # 4. Hand over the change.
    meter.enter("serialise")
    write_durably(Path(job.change_path), encode_values(optimizer.change()))
    meter.close()
    return TrainOutcome(
        examples=seen,
        steps_applied=applied,
        steps_skipped=len(batches) - applied,
        mean_loss=loss_sum / seen if seen else None,
        seconds=time.monotonic() - started,
        memory=_report(meter, prediction, job.cap_bytes, floor),
    )


def evaluate(job: EvaluateJob, meter: Meter) -> EvaluateOutcome:
    """Accuracy and mean loss of the given values over a data file, by the primal programs alone."""
    started, floor = time.monotonic(), status_bytes("VmRSS")
    meter.enter("load")
    package, values, examples = _load(job, job.sequence_limit)
    longest = max(map(len, examples.ids))
    micro_batch, prediction = largest_micro_batch(
        package.manifest,
        job.cap_bytes,
        first_segment=None,
        batch_size=preferred_micro_batch(len(examples.ids), longest),
        sequence=longest,
        draws=0,
        floor_bytes=floor,
    )
    _admit(prediction, job.cap_bytes)
    executor = Executor(package, OnnxEngine(job.threads))

    meter.enter("evaluate")
    correct, loss_sum = 0, 0.0
    for group in group_by_length(examples.ids, micro_batch):
        batch = examples.batch(group)
        sweep = executor.sweep(values, [batch])
        correct += int((sweep.logits.argmax(axis=1) == batch.labels).sum())
        loss_sum += float(sweep.loss.sum(dtype=np.float64))
    meter.close()
    return EvaluateOutcome(
        rows=len(examples.ids),
        accuracy=correct / len(examples.ids),
        mean_loss=loss_sum / len(examples.ids),
        seconds=time.monotonic() - started,
        memory=_report(meter, prediction, job.cap_bytes, floor),
    )


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensors instead of returning each to the kernel and faulting it in again.

    One heap for all threads, and thresholds above the largest tensor (mallopt(3)): the engine allocates and
    frees tensors of the same sizes at every operator. Measured in docs/decisions/0003-engine.md.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.info("event=mallopt_missing effect=more_page_faults")
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20)):
        mallopt(option, value)


def run(job: Job, announce: Callable[[str], None] | None = None) -> TrainOutcome | EvaluateOutcome:
    """Do one job in this process; ``announce`` is called with each phase as it is entered."""
    keep_freed_memory()
    meter = Meter(announce)
    return train(job, meter) if isinstance(job, TrainJob) else evaluate(job, meter)


def main() -> int:
    """Read a job from standard input, do it, write phases and the outcome to standard output."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    try:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    except msgspec.DecodeError as error:
        answer, code = msgspec.json.encode(describe_failure(WorkerError(f"malformed job: {error}"))), 1
    else:
        try:
            answer, code = msgspec.json.encode(run(job, _announce)), 0
        except Exception as error:
            if ran_out_of_memory(error):
                failure = describe_failure(OutOfMemoryError(f"{type(error).__name__}: {error}"))
            elif isinstance(error, EdgeError):
                failure = describe_failure(error)
            else:
                raise
            answer, code = msgspec.json.encode(failure), 1
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    return FAILURE_EXIT_CODE if code else 0


def _announce(phase: str) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(PhaseEntered(phase)) + b"\n")
    sys.stdout.buffer.flush()


def _load(job: Job, sequence_limit: int) -> tuple[Package, Values, Examples]:
    """Package, slice values and tokenised rows of a job; the tokenizer is freed before any session loads."""
    package = Package.open(Path(job.package_folder), job.publisher_key)
    try:
        state = Path(job.state_path).read_bytes()
    except OSError as error:
        raise WorkerError(f"cannot read the slice values {job.state_path}: {error.strerror}") from error
    values = decode_values(state, package.manifest.slices)
    rows = load_rows(Path(job.data_path), package.manifest.labels)
    limit = min(sequence_limit, package.manifest.sequence_limit)
    ids = Tokenizer(package.path(package.manifest.tokenizer), limit).encode(rows)
    return package, values, Examples(ids, [row.label for row in rows], package.manifest.pad_token_id)


def _admit(prediction: PeakPrediction, cap_bytes: int) -> None:
    required = prediction.total_bytes
    if required > cap_bytes:
        raise CapExceededError(
            f"the task needs {required >> 20} MiB at one example a time, the cap is {cap_bytes >> 20} MiB; "
            "grant a larger cap, or ask for shorter sequences, fewer draws or slices nearer the head",
            required_bytes=required,
            cap_bytes=cap_bytes,
        )


def _report(meter: Meter, prediction: PeakPrediction, cap_bytes: int, floor_bytes: int) -> MemoryReport:
    return MemoryReport(
        predicted_peak_bytes=prediction.total_bytes,
        high_water_bytes=meter.peak_bytes,
        cap_bytes=cap_bytes,
        anonymous_bytes=status_bytes("RssAnon"),
        file_bytes=status_bytes("RssFile"),
        floor_bytes=floor_bytes,
        phases=meter.phases,
    )


if __name__ == "__main__":
    raise SystemExit(main())
