"""What the learning bench's arms take on a device: memory, and time under one cap, each measured in fresh workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.harness.minilm import packaged_model
from benchmarks.learning.arms import ARMS, rate_of
from benchmarks.memory.subjects import opened, step_seconds
from coordinator.simulation.config import merged
from edge_runtime.errors import CapExceededError
from edge_runtime.protocol.messages import Task
from edge_runtime.worker.jobs import TrainJob, TrainOutcome
from edge_runtime.worker.process import run_worker

AMPLE_BYTES = 512 << 20
STEPS, BATCH, SEQUENCE = 5, 8, 64
REPETITIONS = 5
#: A common cap begins at backpropagation's peak times this, and is multiplied by it until both arms have a plan.
ROOM = 1.05
#: Settings of a run that a task has under another name, or does not have.
OF_THE_SERVER = ("slices", "split", "server_optimizer", "rate_decay", "local_optimizer")


@dataclass(frozen=True)
class SameCap:
    """Two arms under one cap.

    Attributes:
        cap_bytes: cap of both.
        times: ratios of their seconds a step, one for each time they ran in turn.
    """

    cap_bytes: int
    times: tuple[float, ...]


def peaks(output: Path, task: str, names: tuple[str, ...]) -> dict[str, int]:
    """VmHWM of a worker that trains one task, in bytes, by arm; arms whose package is not there are left out."""
    found = {}
    for name in names:
        if (output / _package(task, name)).is_dir():
            job = _job(output, task, name, AMPLE_BYTES)
            found[name] = run_worker(job, TrainOutcome).memory.high_water_bytes
    return found


def at_equal_memory(output: Path, task: str, name: str, peak_bytes: int) -> SameCap:
    """An arm beside backpropagation on the same slices, both under about the least cap that backpropagation needs.

    Args:
        output: folder of the bench, with packages and data.
        task: task of the bench.
        name: name of the arm.
        peak_bytes: peak of backpropagation with ample memory.
    """
    cap_bytes = int(peak_bytes * ROOM)
    while True:
        try:
            return SameCap(cap_bytes, _side_by_side(output, task, name, cap_bytes))
        except CapExceededError:
            cap_bytes = int(cap_bytes * ROOM)


def with_ample_memory(output: Path, task: str, name: str) -> SameCap:
    """An arm beside backpropagation with so much memory that all draws run together."""
    return SameCap(AMPLE_BYTES, _side_by_side(output, task, name, AMPLE_BYTES))


def _side_by_side(output: Path, task: str, name: str, cap_bytes: int) -> tuple[float, ...]:
    ours, theirs = (_job(output, task, arm, cap_bytes) for arm in (name, "backprop"))
    return tuple(_step_seconds(ours) / _step_seconds(theirs) for _ in range(REPETITIONS))


def _step_seconds(job: TrainJob) -> float:
    """Median seconds of the steps after the first, which also pays for what is done once."""
    return step_seconds(run_worker(job, TrainOutcome).steps)


def _package(task: str, name: str) -> str:
    return f"packages/{task}-{ARMS[name].package}"


def _job(output: Path, task: str, name: str, cap_bytes: int) -> TrainJob:
    """The job of a worker that trains one task of an arm."""
    rows = output / f"rows-{task}.jsonl"
    lines = (output / "data" / task / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[: STEPS * BATCH]), encoding="utf-8")
    subject = opened(name, packaged_model(), output / _package(task, name), rows, threads=1)
    run = ARMS[name].with_rate(rate_of(task, name))
    job = subject.job(
        None,
        steps=STEPS,
        batch_size=BATCH,
        sequence=SEQUENCE,
        slices=() if run.get("slices") == "none" else None,
        cap_bytes=cap_bytes,
        arithmetic="row_int8",
    )
    own = {key: value for key, value in run.items() if key not in OF_THE_SERVER}
    optimizer = {"slice_rate": 1 / STEPS, "head_rate": 1 / STEPS, **run.get("local_optimizer", {})}
    changed = merged(msgspec.to_builtins(job.task), {**own, "optimizer": optimizer})
    return msgspec.structs.replace(job, task=msgspec.convert(changed, Task))
