"""`make bench`: the runtime's training step beside PyTorch's, on one machine, same cores, same text.

all-MiniLM-L6-v2, batches of 8 rows of 128 tokens, 77 labels. Every arm is a fresh process per repetition, and the arms
take turns, so that a busy machine disturbs them alike: ratios are taken within a repetition. The worker's memory is
that of the worker itself, its time that of the same job with a clock beside its loop. What stands in the table: the
median over repetitions, beside the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.harness.long_rows import LABELS, write_full_rows
from benchmarks.harness.measured_process import Measured, pinned_to_cores, python_program, run_measured
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.tables import table
from edge_runtime.memory.plan import ExecutionChoice, preferred_micro_batch
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import read_prepared
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, PrepareJob, TrainJob, TrainOutcome
from edge_runtime.worker.process import ensure_prepared

RESULT = RESULTS / "bench.json"
BATCH, TOKENS, ROWS = 8, 128, 64
#: What the demo grants a device.
CAP_BYTES = 256 << 20
PREFERRED_ROWS = preferred_micro_batch(BATCH, TOKENS)
WARM_UP_STEPS = 2

PEAK_REACH = 1 / 6
STEP_REACH = 0.9
DUAL_REACH = 2.4

#: Values of one arm in one repetition, by what was measured: ``resident``, ``charged``, ``predicted``, ``step``.
Values = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One thing to measure: ``measure`` runs its fresh processes once."""

    name: str
    measure: Callable[[], Values]


class Bench:
    """The package, the text and the settings that all arms share."""

    def __init__(self, folder: Path, threads: int, steps: int) -> None:
        self.folder, self.threads, self.steps = folder, threads, steps
        self.model = packaged_model()
        self.rows = folder / "rows.jsonl"
        write_full_rows(self.rows, self.model / "tokenizer.json", TOKENS, ROWS)
        key = generate_key()
        key.save(folder / "publisher.key")
        export = python_program(
            "export.cli", "package", self.model, "--labels", LABELS, "--check-data", self.rows
        )
        export += ["--output", str(folder / "package"), "--key", str(folder / "publisher.key")]
        subprocess.run([*export, "--sequence-limit", str(TOKENS)], check=True, stdout=subprocess.DEVNULL)
        self.package = Package.open(folder / "package", key.public_key)
        self.prepared = folder / "prepared"
        ensure_prepared(
            PrepareJob(
                str(self.package.folder), self.package.sha256, str(self.prepared), CAP_BYTES, self.threads
            )
        )
        self.arithmetic = read_prepared(self.prepared).arithmetic
        manifest = self.package.manifest
        self.slices = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
        self.notes: set[str] = set()

    def torch(self, *, checkpointing: bool) -> Values:
        """(a) and (b): one process gives memory and time."""
        settings = {
            "model": str(self.model),
            "labels": str(LABELS),
            "rows": str(self.rows),
            "tokens": TOKENS,
            "batch_size": BATCH,
            "steps": WARM_UP_STEPS + self.steps,
            "threads": self.threads,
            "checkpointing": checkpointing,
        }
        measured = self._run(python_program("benchmarks.memory.torch_step"), json.dumps(settings).encode())
        done = json.loads(measured.output)
        peaks = self._peaks(measured, done["high_water_bytes"])
        return {**peaks, "step": median(done["seconds"][WARM_UP_STEPS:])}

    def train(self, *, draws: int, rows_at_a_time: int) -> Values:
        """(c): the worker itself gives memory, under its cap; the same job with a clock gives time."""
        job = self.train_job(draws, rows_at_a_time)
        given = msgspec.json.encode(job)
        measured = self._run(python_program("edge_runtime.worker.main"), given, limit_bytes=CAP_BYTES)
        memory = msgspec.json.decode(measured.output.splitlines()[-1], type=TrainOutcome).memory
        timed = json.loads(self._run(python_program("benchmarks.memory.timed_worker"), given).output)
        if timed["group_rows"] != [rows_at_a_time]:
            raise SystemExit(
                f"error: the plan ran groups of {timed['group_rows']} rows, not {rows_at_a_time}"
            )
        return {
            **self._peaks(measured, memory.high_water_bytes),
            "predicted": memory.predicted_peak_bytes,
            "step": median(timed["seconds"][WARM_UP_STEPS - 1 :]),
        }

    def evaluate(self) -> Values:
        """(d): the primal programs alone over the same rows; time for as many rows as a batch has."""
        package = self.package
        job = EvaluateJob(
            package_folder=str(package.folder),
            package_sha256=package.sha256,
            prepared_folder=str(self.prepared),
            state_path=str(package.path(package.manifest.initial_state)),
            data_path=str(self.rows),
            sequence_limit=TOKENS,
            cap_bytes=CAP_BYTES,
            threads=self.threads,
        )
        given = msgspec.json.encode(job)
        measured = self._run(python_program("edge_runtime.worker.main"), given, limit_bytes=CAP_BYTES)
        memory = msgspec.json.decode(measured.output.splitlines()[-1], type=EvaluateOutcome).memory
        timed = json.loads(self._run(python_program("benchmarks.memory.timed_worker"), given).output)
        groups = BATCH // timed["group_rows"][0]
        return {
            **self._peaks(measured, memory.high_water_bytes),
            "predicted": memory.predicted_peak_bytes,
            "step": groups * median(timed["seconds"][WARM_UP_STEPS:]),
        }

    def block_programs(self, rows_at_a_time: int) -> dict[int, float]:
        """Seconds of the block's program by number of draws; 0 is its primal program."""
        command = python_program("benchmarks.memory.block_programs", "1,4", 40, rows_at_a_time)
        output = self._run(command, msgspec.json.encode(self.train_job(1, rows_at_a_time))).output
        return {int(draws): median(seconds) for draws, seconds in json.loads(output).items()}

    def train_job(self, draws: int, rows_at_a_time: int) -> TrainJob:
        """A task that trains all slices and the head, resident and with all draws at once."""
        package = self.package
        task = Task(
            task_id="benchmark",
            run_id="benchmark",
            round=0,
            slot=0,
            seed=0,
            package=package.sha256,
            package_signature="A" * 86 + "==",
            state="0" * 64,
            slices=self.slices,
            train_head=True,
            steps=WARM_UP_STEPS + self.steps,
            batch_size=BATCH,
            draws=draws,
            sequence_limit=TOKENS,
            optimizer=LocalOptimizer("adamw", slice_rate=1e-3, head_rate=1e-3),
            required_bytes=0,
            deadline_s=0.0,
        )
        return TrainJob(
            package_folder=str(package.folder),
            package_sha256=package.sha256,
            prepared_folder=str(self.prepared),
            state_path=str(package.path(package.manifest.initial_state)),
            data_path=str(self.rows),
            delta_path=str(self.folder / "change.safetensors"),
            task=task,
            cap_bytes=CAP_BYTES,
            threads=self.threads,
            choice=ExecutionChoice("resident", rows_at_a_time, draws),
        )

    def _run(self, command: list[str], given: bytes, limit_bytes: int | None = None) -> Measured:
        measured = run_measured(command, given, limit_bytes=limit_bytes)
        if measured.note:
            self.notes.add(measured.note)
        return measured

    @staticmethod
    def _peaks(measured: Measured, resident_bytes: int) -> Values:
        """Two independent figures of the whole process tree."""
        charged = measured.cgroup_peak_bytes or measured.max_resident_bytes
        return {"resident": resident_bytes + measured.children_peak_bytes, "charged": charged}


def main() -> int:
    """Measure all arms in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    cores = pinned_to_cores(arguments.threads)

    with tempfile.TemporaryDirectory() as temporary:
        print("Exporting all-MiniLM-L6-v2", flush=True)
        bench = Bench(Path(temporary), arguments.threads, arguments.steps)
        measured, blocks = _take_turns(bench, arguments.repetitions)
    conditions: dict[str, Any] = {
        "model": "all-MiniLM-L6-v2",
        "batch": f"{BATCH} x {TOKENS} tokens",
        "repetitions": arguments.repetitions,
        "steps": arguments.steps,
        "cores": len(cores),
        "arithmetic": bench.arithmetic,
        "worker_limit": "enforced by a memory cgroup" if not bench.notes else "; ".join(sorted(bench.notes)),
    }
    command = (
        " ".join(["python -m benchmarks.memory.first_figures", *sys.argv[1:]])
        if sys.argv[1:]
        else "make bench"
    )
    document = write_result(
        arguments.output, command, arguments.threads, _figures(measured, blocks), conditions
    )
    print("\n" + table(document))
    return 0


def _arms(bench: Bench) -> list[Arm]:
    def training(draws: int, rows: int) -> Callable[[], Values]:
        return lambda: bench.train(draws=draws, rows_at_a_time=rows)

    return [
        Arm("PyTorch", lambda: bench.torch(checkpointing=False)),
        Arm("PyTorch, checkpointed", lambda: bench.torch(checkpointing=True)),
        Arm("worker, 1 draw", training(1, PREFERRED_ROWS)),
        Arm("worker, 4 draws", training(4, PREFERRED_ROWS)),
        Arm("worker, 1 draw, one example at a time", training(1, 1)),
        Arm("worker, 4 draws, one example at a time", training(4, 1)),
        Arm("worker, inference alone", bench.evaluate),
    ]


def _take_turns(
    bench: Bench, repetitions: int
) -> tuple[dict[str, list[Values]], dict[int, list[dict[int, float]]]]:
    """All arms, then the block's programs, repeated; a first turn, uncounted, warms the page cache."""
    measured: dict[str, list[Values]] = defaultdict(list)
    blocks: dict[int, list[dict[int, float]]] = defaultdict(list)
    arms = _arms(bench)
    for turn in range(repetitions + 1):
        print(f"Turn {turn} of {repetitions}" if turn else "Warming up", flush=True)
        for arm in arms:
            values = arm.measure()
            if turn:
                measured[arm.name].append(values)
        for rows in (PREFERRED_ROWS, 1):
            seconds = bench.block_programs(rows)
            if turn:
                blocks[rows].append(seconds)
    return measured, blocks


def _figures(measured: dict[str, list[Values]], blocks: dict[int, list[dict[int, float]]]) -> list[Figure]:
    figures = []
    for what, unit, title in (
        ("resident", "bytes", "Peak memory (VmHWM)"),
        ("charged", "bytes", "Peak memory (charged by the kernel)"),
        ("predicted", "bytes", "Predicted peak"),
        ("step", "seconds", "Step"),
    ):
        for name, turns in measured.items():
            if what in turns[0]:
                figures.append(figure(f"{title}: {name}", unit, [turn[what] for turn in turns]))
    baseline = measured["PyTorch"]
    for what, title, reach in (
        ("resident", "Peak memory over PyTorch's", PEAK_REACH),
        ("step", "Step over PyTorch's", STEP_REACH),
    ):
        for name, turns in measured.items():
            if name == "PyTorch" or name.endswith("alone"):
                continue
            ratios = [turn[what] / base[what] for turn, base in zip(turns, baseline, strict=True)]
            promised = reach if name.startswith("worker") else None
            figures.append(figure(f"{title}: {name}", "times", ratios, promised))
    for rows, programs in blocks.items():
        for draws in (1, 4):
            ratios = [seconds[draws] / seconds[0] for seconds in programs]
            name = f"Dual program over primal: one block, {_count(draws, 'draw')}, {_count(rows, 'example')}"
            figures.append(
                figure(name, "times", ratios, DUAL_REACH if (draws, rows) == (1, PREFERRED_ROWS) else None)
            )
    return figures


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


if __name__ == "__main__":
    sys.exit(main())
