"""The worker process: one job in, one outcome out (see ``edge_runtime.jobs``).

Training a task is :func:`train`, readable top to bottom; evaluation is :func:`evaluate`.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.data import Tokenizer, draw_batches, load_rows, make_batch
from edge_runtime.durable import write_durably
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.errors import CapExceededError, EdgeError, WorkerError
from edge_runtime.executor import Executor, Sweep, first_dual_segment
from edge_runtime.gradient import estimate, head_gradient
from edge_runtime.jobs import (
    FAILURE_EXIT_CODE,
    EvaluateJob,
    EvaluateOutcome,
    Job,
    TrainJob,
    TrainOutcome,
    describe_failure,
)
from edge_runtime.messages import MemoryReport
from edge_runtime.meter import Meter, cgroup_peak_bytes, status_bytes
from edge_runtime.optimizers import make_optimizer
from edge_runtime.package import Package
from edge_runtime.plan import PeakPrediction, largest_micro_batch
from edge_runtime.slices import Values, decode_values, encode_values, shapes
from edge_runtime.tangents import draw_tangents

log = logging.getLogger(__name__)

#: Rows evaluated at a time: enough to keep the engine busy, small beside the weights.
EVALUATION_BATCH = 32


def train(job: TrainJob, meter: Meter) -> TrainOutcome:
    """Run a task's local steps and write the change of its slices to ``job.change_path``.

    Raises:
        CapExceededError: no micro-batch fits the cap, with both figures.
        EdgeError: package, state or data cannot be used.
    """
    task, started = job.task, time.monotonic()
    floor = status_bytes("VmRSS")

    # 1. Open what the task names; everything is verified before it is used.
    meter.enter("load")
    package = _open(job)
    values = _read_state(job, package)
    rows = load_rows(Path(job.data_path), package.manifest.labels)
    limit = min(task.sequence_limit, package.manifest.sequence_limit)
    ids = Tokenizer(package.path(package.manifest.tokenizer), limit).encode(rows)
    specs = [package.manifest.slice_named(name) for name in task.slices]

    # 2. Choose a micro-batch that fits the cap, or refuse with numbers.
    micro_batch, prediction = largest_micro_batch(
        package.manifest,
        job.cap_bytes,
        first_segment=first_dual_segment(package, task.slices),
        batch_size=task.batch_size,
        sequence=min(limit, max(len(row) for row in ids)),
        draws=task.draws,
        floor_bytes=floor,
    )
    _admit(prediction, job.cap_bytes)
    executor = Executor(package, OnnxEngine(job.threads), task.slices)

    # 3. Local steps.
    meter.enter("step")
    heads = [package.manifest.head] if task.train_head else []
    optimizer = make_optimizer(task.optimizer, values, list(shapes([*specs, *heads])))
    batches = draw_batches(
        len(ids),
        seed=task.seed,
        round_number=task.round,
        slot=task.slot,
        steps=task.steps,
        batch_size=task.batch_size,
    )
    applied, examples, loss_sum = 0, 0, 0.0
    for step, chosen in enumerate(batches):
        groups = _group_by_length([ids[row] for row in chosen], micro_batch)
        micro_batches = [
            make_batch(
                [ids[chosen[i]] for i in group],
                [rows[chosen[i]].label for i in group],
                pad_token_id=package.manifest.pad_token_id,
            )
            for group in groups
        ]
        tangents = [draw_tangents(task, specs, step, group) for group in groups]
        sweep = executor.sweep(optimizer.values(), micro_batches, tangents)
        if not _finite(sweep):
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, step)
            continue
        gradient: Values = {}
        if sweep.jvps is not None:
            joined = {name: np.concatenate([t[name] for t in tangents], axis=1) for name in tangents[0]}
            gradient.update(estimate(sweep.jvps, joined))
        if task.train_head:
            gradient.update(head_gradient(sweep.residual, sweep.features, package.manifest.head.name))
        optimizer.step(gradient)
        applied, examples = applied + 1, examples + len(chosen)
        loss_sum += float(sweep.loss.sum(dtype=np.float64))

    # 4. Hand over the change.
    meter.enter("serialise")
    write_durably(Path(job.change_path), encode_values(optimizer.change()))
    meter.close()
    return TrainOutcome(
        examples=examples,
        steps_applied=applied,
        steps_skipped=len(batches) - applied,
        mean_loss=loss_sum / examples if examples else None,
        seconds=time.monotonic() - started,
        memory=_report(meter, prediction, job.cap_bytes, floor),
    )


def evaluate(job: EvaluateJob, meter: Meter) -> EvaluateOutcome:
    """Accuracy and mean loss of the given values over a data file, by the primal programs alone."""
    started, floor = time.monotonic(), status_bytes("VmRSS")
    meter.enter("load")
    package = _open(job)
    values = _read_state(job, package)
    rows = load_rows(Path(job.data_path), package.manifest.labels)
    limit = min(job.sequence_limit, package.manifest.sequence_limit)
    ids = Tokenizer(package.path(package.manifest.tokenizer), limit).encode(rows)
    micro_batch, prediction = largest_micro_batch(
        package.manifest,
        job.cap_bytes,
        first_segment=None,
        batch_size=EVALUATION_BATCH,
        sequence=max(len(row) for row in ids),
        draws=0,
        floor_bytes=floor,
    )
    _admit(prediction, job.cap_bytes)
    executor = Executor(package, OnnxEngine(job.threads))

    meter.enter("evaluate")
    correct, loss_sum = 0, 0.0
    for group in _group_by_length(ids, micro_batch):
        labels = [rows[i].label for i in group]
        batch = make_batch([ids[i] for i in group], labels, pad_token_id=package.manifest.pad_token_id)
        sweep = executor.sweep(values, [batch])
        correct += int((sweep.logits.argmax(axis=1) == batch.labels).sum())
        loss_sum += float(sweep.loss.sum(dtype=np.float64))
    meter.close()
    return EvaluateOutcome(
        rows=len(rows),
        accuracy=correct / len(rows),
        mean_loss=loss_sum / len(rows),
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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def run(job: Job) -> TrainOutcome | EvaluateOutcome:
    """Do one job in this process."""
    keep_freed_memory()
    meter = Meter()
    return train(job, meter) if isinstance(job, TrainJob) else evaluate(job, meter)


def main() -> int:
    """Read a job from standard input, do it, write the outcome to standard output."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    try:
        job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    except msgspec.DecodeError as error:
        answer, code = msgspec.json.encode(describe_failure(WorkerError(f"malformed job: {error}"))), 1
    else:
        try:
            answer, code = msgspec.json.encode(run(job)), 0
        except EdgeError as error:
            answer, code = msgspec.json.encode(describe_failure(error)), 1
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    return FAILURE_EXIT_CODE if code else 0


def _open(job: Job) -> Package:
    return Package.open(Path(job.package_folder), job.publisher_key)


def _read_state(job: Job, package: Package) -> Values:
    try:
        data = Path(job.state_path).read_bytes()
    except OSError as error:
        raise WorkerError(f"cannot read the slice values {job.state_path}: {error.strerror}") from error
    return decode_values(data, package.manifest.slices)


def _admit(prediction: PeakPrediction, cap_bytes: int) -> None:
    required = prediction.total_bytes
    if required > cap_bytes:
        raise CapExceededError(
            f"the task needs {required >> 20} MiB at one example a time, the cap is {cap_bytes >> 20} MiB; "
            "grant a larger cap, or ask for shorter sequences, fewer draws or slices nearer the head",
            required_bytes=required,
            cap_bytes=cap_bytes,
        )


def _group_by_length(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Positions in groups of ``size``, like lengths together, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda position: (len(ids[position]), position))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _finite(sweep: Sweep) -> bool:
    return bool(np.isfinite(sweep.loss).all() and (sweep.jvps is None or np.isfinite(sweep.jvps).all()))


def _report(meter: Meter, prediction: PeakPrediction, cap_bytes: int, floor_bytes: int) -> MemoryReport:
    return MemoryReport(
        predicted_peak_bytes=prediction.total_bytes,
        high_water_bytes=meter.peak_bytes,
        cap_bytes=cap_bytes,
        cgroup_peak_bytes=cgroup_peak_bytes(),
        anonymous_bytes=status_bytes("RssAnon"),
        file_bytes=status_bytes("RssFile"),
        floor_bytes=floor_bytes,
        phases=meter.phases,
    )


if __name__ == "__main__":
    raise SystemExit(main())
