"""A worker that obeys the contract of edge_runtime.worker.jobs and trains by a formula.

python -m tests.faults.formula_worker NAME
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec

from edge_runtime.memory.plan import ExecutionChoice, PeakPrediction, Plan, Work
from edge_runtime.package.manifest import MANIFEST, parse_manifest
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.messages import MemoryReport
from edge_runtime.training.protected import protect
from edge_runtime.worker.jobs import PrepareOutcome, TrainJob, TrainOutcome
from tests.coordinator.formula import delta_of, examples_of
from tests.edge_runtime.packages import write_prepared


def main(name: str) -> None:
    """Do the job on standard input."""
    text = sys.stdin.read()
    job = json.loads(text)
    memory = MemoryReport(5, 4, job["cap_bytes"], floor_bytes=3)
    if "task" not in job:
        write_prepared(Path(job["prepared_folder"]), job["package_sha256"])
        print(msgspec.json.encode(PrepareOutcome("float", (), 0.1, memory)).decode())
        return
    task = msgspec.json.decode(text, type=TrainJob).task
    manifest = parse_manifest((Path(job["package_folder"]) / MANIFEST).read_bytes())
    Path(job["state_path"]).read_bytes()
    change = encode_values(delta_of(manifest.slices, task, name))
    change = protect(task, manifest, change, examples_of(task), bytes(32))
    Path(job["delta_path"]).write_bytes(change)
    plan = Plan(
        Work(task.batch_size, 16, 1, task.slices),
        ExecutionChoice("resident", 1, 1),
        PeakPrediction(0, 0, 0, 0, 0, 0, 0, 0),
        None,
    )
    outcome = TrainOutcome(examples_of(task), 3, 0, 0.5, 1.0, memory, plan)
    print(msgspec.json.encode(outcome).decode())


if __name__ == "__main__":
    main(sys.argv[1])
