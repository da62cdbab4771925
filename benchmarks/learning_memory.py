"""What the learning bench's arms take on a device: memory, and time under one cap, each in workers of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.learning_arms import ARMS, rate_of
from edge_runtime.errors import CapExceededError
from edge_runtime.jobs import PrepareJob, TrainJob, TrainOutcome, ensure_prepared, run_worker
from edge_runtime.messages import Task
from edge_runtime.package import Package

AMPLE_BYTES = 512 << 20
STEPS, BATCH, SEQUENCE = 5, 8, 64
REPETITIONS = 5
#: What a common cap begins with over backpropagation's peak, and grows by until both arms have a plan.
ROOM = 1.05
#: Settings of a run that a task has under another name, or not at all.
OF_THE_SERVER = (
    "slices",
    "split",
    "server_optimizer",
    "rate_decay",
    "local_optimizer",
    "average_from_round",
    "head_warm_up_rounds",
)


@dataclass(frozen=True)
class SameCap:
    """Two arms under one cap: ratios of their times a step, run in turn."""

    cap_bytes: int
    times: tuple[float, ...]


def peaks(output: Path, task: str, names: tuple[str, ...]) -> dict[str, int]:
    """Arm to VmHWM of a worker that trains one task of it, in bytes; those whose package is not there are left out."""
    found = {}
    for name in names:
        if (output / _package(task, name)).is_dir():
            with _job(output, task, name, AMPLE_BYTES) as job:
                found[name] = run_worker(job, TrainOutcome).memory.high_water_bytes
    return found


def at_equal_memory(output: Path, task: str, name: str, peak_bytes: int) -> SameCap:
    """An arm beside backpropagation on the same slices, both under about the least cap that backpropagation needs.

    Args:
        peak_bytes: backpropagation's, where there was ample memory.
    """
    cap_bytes = int(peak_bytes * ROOM)
    while True:
        try:
            return SameCap(cap_bytes, _side_by_side(output, task, name, cap_bytes))
        except CapExceededError:
            cap_bytes = int(cap_bytes * ROOM)


def with_ample_memory(output: Path, task: str, name: str) -> SameCap:
    """The same where all draws are run together."""
    return SameCap(AMPLE_BYTES, _side_by_side(output, task, name, AMPLE_BYTES))


def _side_by_side(output: Path, task: str, name: str, cap_bytes: int) -> tuple[float, ...]:
    with _job(output, task, name, cap_bytes) as ours, _job(output, task, "backprop", cap_bytes) as theirs:
        return tuple(_step_seconds(ours) / _step_seconds(theirs) for _ in range(REPETITIONS))


def _step_seconds(job: TrainJob) -> float:
    """Of the steps after the first, which pays for what is made once."""
    ends = [step.end_s for step in run_worker(job, TrainOutcome).steps]
    return median(later - earlier for earlier, later in pairwise(ends))


def _package(task: str, name: str) -> str:
    return f"packages/{task}-{ARMS[name].package}"


@contextmanager
def _job(output: Path, task: str, name: str, cap_bytes: int) -> Iterator[TrainJob]:
    """A task of an arm, ready to be run."""
    package = Package.open_unsigned(output / _package(task, name))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = work / "rows.jsonl"
        lines = (output / "data" / task / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[: STEPS * BATCH]), encoding="utf-8")
        prepared = work / "prepared"
        ensure_prepared(
            PrepareJob(str(package.folder), package.sha256, str(prepared), AMPLE_BYTES, arithmetic="row_int8")
        )
        yield TrainJob(
            package_folder=str(package.folder),
            package_sha256=package.sha256,
            prepared_folder=str(prepared),
            state_path=str(package.path(package.manifest.initial_state)),
            data_path=str(rows),
            change_path=str(work / "change.safetensors"),
            task=_task(package, task, name),
            cap_bytes=cap_bytes,
        )


def _task(package: Package, task: str, name: str) -> Task:
    run = ARMS[name].with_rate(rate_of(task, name))
    available = tuple(spec.name for spec in package.manifest.slices if spec.kind != "head")
    given: dict[str, Any] = {
        "task_id": name,
        "run_id": "bench",
        "round": 0,
        "slot": 0,
        "seed": 0,
        "package": package.sha256,
        "package_signature": "A" * 86 + "==",
        "state": "0" * 64,
        "slices": () if run.get("slices") == "none" else available,
        "train_head": package.manifest.head is not None,
        "steps": STEPS,
        "batch_size": BATCH,
        "draws": 1,
        "sequence_limit": SEQUENCE,
        "optimizer": {"name": "accumulate", "slice_rate": 1 / STEPS, "head_rate": 1 / STEPS}
        | run.get("local_optimizer", {}),
        "required_bytes": 0,
        "deadline_s": 0.0,
        **{key: value for key, value in run.items() if key not in OF_THE_SERVER},
    }
    return msgspec.json.decode(json.dumps(given), type=Task)
