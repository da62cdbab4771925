"""`make bench`: the runtime's training step beside PyTorch's, on one machine, same cores, same text.

all-MiniLM-L6-v2, batches of 8 rows of 128 tokens, 77 labels. Every arm is a fresh process per repetition, and the arms
take turns, so that a busy machine disturbs them alike: ratios are taken within a turn. The worker runs under its cap,
and tells the end of each of its steps itself. The table shows the median over repetitions, beside the smallest and
largest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.measured_process import Measured, pinned_to_cores, python_program, run_measured
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.tables import table
from benchmarks.harness.turns import Readings, take_turns
from benchmarks.memory.subjects import MINILM, TOKENS, Subject, make_subjects, step_seconds
from benchmarks.memory.torch_peer import run_torch_steps
from edge_runtime.memory.plan import ExecutionChoice, preferred_micro_batch
from edge_runtime.package.prepared import read_prepared
from edge_runtime.protocol.messages import LocalOptimizer, MemoryReport
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, TrainJob, TrainOutcome

RESULT = RESULTS / "bench.json"
BATCH = 8
#: What the demo grants a device.
CAP_BYTES = 256 << 20
PREFERRED_ROWS = preferred_micro_batch(BATCH, TOKENS)
WARM_UP_STEPS = 2
ADAMW = LocalOptimizer("adamw", slice_rate=1e-3, head_rate=1e-3)

PEAK_REACH = 1 / 6
STEP_REACH = 0.9
DUAL_REACH = 2.4


class StepBench:
    """The arms of the comparison, all on one subject.

    An arm gives ``resident`` and ``charged``, two independent figures of its peak in bytes, and ``step`` in seconds; a
    worker also ``predicted``, in bytes.
    """

    def __init__(self, subject: Subject, steps: int) -> None:
        self.subject, self.steps = subject, steps
        self.prepared = subject.prepared(cap_bytes=CAP_BYTES)
        self.arithmetic = read_prepared(self.prepared).arithmetic
        self.notes: set[str] = set()

    def arms(self) -> dict[str, Callable[[], Readings]]:
        """PyTorch's steps and the worker's, by title."""
        return {
            "PyTorch": partial(self.torch, checkpointing=False),
            "PyTorch, checkpointed": partial(self.torch, checkpointing=True),
            "worker, 1 draw": partial(self.train, draws=1, rows_at_a_time=PREFERRED_ROWS),
            "worker, 4 draws": partial(self.train, draws=4, rows_at_a_time=PREFERRED_ROWS),
            "worker, 1 draw, one example at a time": partial(self.train, draws=1, rows_at_a_time=1),
            "worker, 4 draws, one example at a time": partial(self.train, draws=4, rows_at_a_time=1),
            "worker, inference alone": self.evaluate,
        }

    def block_arms(self) -> dict[str, Callable[[], Readings]]:
        """One block's programs, by the number of examples they run at a time."""
        return {_count(rows, "example"): partial(self.block_programs, rows) for rows in (PREFERRED_ROWS, 1)}

    def torch(self, *, checkpointing: bool) -> Readings:
        """PyTorch's LoRA step; one process gives memory and time."""
        took = run_torch_steps(
            self.subject,
            batch_size=BATCH,
            micro_batch=BATCH,
            checkpointing=checkpointing,
            warm_up_steps=WARM_UP_STEPS,
            steps=self.steps,
        )
        self._note(took.measured)
        return {
            "resident": took.resident_bytes,
            "charged": _charged_bytes(took.measured),
            "step": took.step_s,
        }

    def train(self, *, draws: int, rows_at_a_time: int) -> Readings:
        """A worker that trains under its cap."""
        given = msgspec.json.encode(self.train_job(draws, rows_at_a_time))
        measured = self._run(python_program("edge_runtime.worker.main"), given, limit_bytes=CAP_BYTES)
        outcome = msgspec.json.decode(measured.output.splitlines()[-1], type=TrainOutcome)
        if outcome.plan.choice.micro_batch != rows_at_a_time:
            raise SystemExit(
                f"error: the plan ran groups of {outcome.plan.choice.micro_batch} rows, not {rows_at_a_time}"
            )
        return _readings(measured, outcome.memory, step_seconds(outcome.steps, WARM_UP_STEPS))

    def evaluate(self) -> Readings:
        """The primal programs alone over the same rows; time for as many rows as a batch has."""
        subject = self.subject
        job = EvaluateJob(
            package_folder=str(subject.package),
            package_sha256=subject.sha256,
            prepared_folder=str(self.prepared),
            state_path=str(subject.package / subject.manifest.initial_state),
            data_path=str(subject.rows),
            sequence_limit=TOKENS,
            cap_bytes=CAP_BYTES,
            threads=subject.threads,
        )
        given = msgspec.json.encode(job)
        measured = self._run(python_program("edge_runtime.worker.main"), given, limit_bytes=CAP_BYTES)
        outcome = msgspec.json.decode(measured.output.splitlines()[-1], type=EvaluateOutcome)
        group_rows = -(-outcome.rows // len(outcome.steps))
        groups = BATCH // group_rows
        return _readings(measured, outcome.memory, groups * step_seconds(outcome.steps, WARM_UP_STEPS))

    def block_programs(self, rows_at_a_time: int) -> Readings:
        """Seconds of the block's program by number of draws; 0 draws stand for its primal program."""
        command = python_program("benchmarks.memory.block_programs", "1,4", 40, rows_at_a_time)
        output = self._run(command, msgspec.json.encode(self.train_job(1, rows_at_a_time))).output
        return {draws: median(seconds) for draws, seconds in json.loads(output).items()}

    def train_job(self, draws: int, rows_at_a_time: int) -> TrainJob:
        """A task that trains all slices and the head, resident and with all draws at once."""
        return self.subject.job(
            ExecutionChoice("resident", rows_at_a_time, draws),
            draws=draws,
            steps=WARM_UP_STEPS + self.steps,
            batch_size=BATCH,
            cap_bytes=CAP_BYTES,
            optimizer=ADAMW,
        )

    def _run(self, command: list[str], given: bytes, limit_bytes: int | None = None) -> Measured:
        measured = run_measured(command, given, limit_bytes=limit_bytes)
        self._note(measured)
        return measured

    def _note(self, measured: Measured) -> None:
        if measured.note:
            self.notes.add(measured.note)


def _readings(measured: Measured, memory: MemoryReport, step_s: float) -> Readings:
    """What a worker gave."""
    return {
        "resident": memory.high_water_bytes + measured.children_peak_bytes,
        "charged": _charged_bytes(measured),
        "predicted": memory.predicted_peak_bytes,
        "step": step_s,
    }


def _charged_bytes(measured: Measured) -> int:
    """The kernel's charge for the whole process tree; without a cgroup, its ``ru_maxrss``."""
    return measured.cgroup_peak_bytes or measured.max_resident_bytes


def main() -> int:
    """Measure all arms in turns and write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, folder=None, repetitions=5, steps=12)
    arguments = parser.parse_args()
    cores = pinned_to_cores(arguments.threads)

    with tempfile.TemporaryDirectory() as temporary:
        subject = make_subjects(Path(temporary), arguments.threads, (MINILM,))[MINILM]
        bench = StepBench(subject, arguments.steps)
        arms, blocks = bench.arms(), bench.block_arms()
        turns = take_turns({**arms, **blocks}, arguments.repetitions, warm_up=True)
    conditions: dict[str, Any] = {
        "model": "all-MiniLM-L6-v2",
        "batch": f"{BATCH} x {TOKENS} tokens",
        "repetitions": arguments.repetitions,
        "steps": arguments.steps,
        "cores": len(cores),
        "arithmetic": bench.arithmetic,
        "worker_limit": "enforced by a memory cgroup" if not bench.notes else "; ".join(sorted(bench.notes)),
    }
    figures = [
        *_figures({name: turns[name] for name in arms}),
        *_block_figures({name: turns[name] for name in blocks}),
    ]
    command = command_line("benchmarks.memory.first_figures", "bench")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _figures(measured: Mapping[str, list[Readings]]) -> list[Figure]:
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
    return figures


def _block_figures(measured: Mapping[str, list[Readings]]) -> list[Figure]:
    figures = []
    for examples, turns in measured.items():
        for draws in (1, 4):
            ratios = [seconds[str(draws)] / seconds["0"] for seconds in turns]
            name = f"Dual program over primal: one block, {_count(draws, 'draw')}, {examples}"
            promised = DUAL_REACH if (draws, examples) == (1, _count(PREFERRED_ROWS, "example")) else None
            figures.append(figure(name, "times", ratios, promised))
    return figures


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


if __name__ == "__main__":
    sys.exit(main())
