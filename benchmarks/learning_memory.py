"""Measured peak memory of the learning bench's arms: a task of each in a worker of its own, held to the fleet's cap."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.learning_arms import ARMS, rate_of
from edge_runtime.jobs import PrepareJob, TrainJob, TrainOutcome, ensure_prepared, run_worker
from edge_runtime.messages import Task
from edge_runtime.package import Package

CAP_BYTES = 512 << 20
STEPS, BATCH, SEQUENCE = 5, 8, 64
#: Settings of a run that a task has under another name, or not at all.
OF_THE_SERVER = ("slices", "split", "server_optimizer", "rate_decay", "local_optimizer")


def peaks(output: Path, task: str, names: tuple[str, ...]) -> dict[str, int]:
    """Arm to VmHWM of a worker that trains one task of it, in bytes; those whose package is not there are left out."""
    return {name: _peak(output, task, name) for name in names if (output / _package(task, name)).is_dir()}


def _package(task: str, name: str) -> str:
    return f"packages/{task}-{ARMS[name].package}"


def _peak(output: Path, task: str, name: str) -> int:
    package = Package.open_unsigned(output / _package(task, name))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = work / "rows.jsonl"
        lines = (output / "data" / task / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[: STEPS * BATCH]), encoding="utf-8")
        prepared = work / "prepared"
        ensure_prepared(
            PrepareJob(str(package.folder), package.sha256, str(prepared), CAP_BYTES, arithmetic="row_int8")
        )
        job = TrainJob(
            package_folder=str(package.folder),
            package_sha256=package.sha256,
            prepared_folder=str(prepared),
            state_path=str(package.path(package.manifest.initial_state)),
            data_path=str(rows),
            change_path=str(work / "change.safetensors"),
            task=_task(package, task, name),
            cap_bytes=CAP_BYTES,
        )
        return run_worker(job, TrainOutcome).memory.high_water_bytes


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
