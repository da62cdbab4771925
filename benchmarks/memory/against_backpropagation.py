"""`make bench-opponent`: forward mode beside the backpropagation baseline, on the same engine, package and caps.

The baseline is checkpointed backpropagation. Both run the same primal programs on the same int8 weights; the baseline
also runs the adjoint programs, keeps each block's input and reads every weight twice. The caps are the smallest that
the planner grants to either, and an ample one. Under each cap both plan for themselves, and the kernel holds them to
it. Where one of them cannot work within a cap, the table has the other's rows alone. The largest batch is the largest
that was planned under the cap and then ran, up to the number of rows at hand.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.measured_process import pinned_to_cores
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.shapes import BERT_BASE, LLAMA_1B
from benchmarks.harness.tables import table
from benchmarks.harness.turns import Readings, take_turns
from benchmarks.memory.subjects import AMPLE_BYTES, MINILM, ROWS, TOKENS, Subject, make_subjects, step_seconds
from edge_runtime.errors import CapExceededError, OutOfMemoryError
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.protocol.messages import Update
from edge_runtime.worker.jobs import TrainOutcome
from edge_runtime.worker.process import run_worker

RESULT = RESULTS / "opponent.json"
SUBJECTS = (MINILM, BERT_BASE.name, LLAMA_1B.name)
ARITHMETIC: Arithmetic = "row_int8"
UPDATES: dict[Update, str] = {"forward": "forward mode", "backprop": "backpropagation"}
BATCH, WARM_UP_STEPS = 8, 1
#: Smallest caps are rounded up to a multiple of this, so that a worker whose own floor is a little higher still fits.
CAP_STEP = 4_000_000


class CappedBench:
    """Runs forward mode and backpropagation on the same subjects, each under the same caps."""

    def __init__(self, subjects: dict[str, Subject], steps: int) -> None:
        self.subjects = subjects
        self.steps = steps
        self.largest: dict[str, int] = {}
        self.plans: dict[str, str] = {}
        self.enforcers: set[str] = set()

    def caps(self, subject: Subject) -> list[int]:
        """The smallest cap of either way to train at this batch, and an ample one, in bytes."""
        return [*sorted({_rounded(self._smallest(subject, update)) for update in UPDATES}), AMPLE_BYTES]

    def arms(self) -> dict[str, Callable[[], Readings | None]]:
        """Both ways to train, on every subject and under every cap, by title."""
        steps = WARM_UP_STEPS + self.steps
        return {
            _key(subject, cap_bytes, update): partial(self.run, subject, cap_bytes, update, BATCH, steps)
            for subject in self.subjects.values()
            for cap_bytes in self.caps(subject)
            for update in UPDATES
        }

    def run(
        self, subject: Subject, cap_bytes: int, update: Update, batch: int, steps: int
    ) -> Readings | None:
        """One worker that plans for itself under a cap.

        Returns:
            ``peak`` and ``read`` (weights read a step) in bytes, ``step`` in seconds; None, after a line that says so,
            if the worker refuses the cap or is killed.
        """
        key = _key(subject, cap_bytes, update)
        job = subject.job(
            None, steps=steps, batch_size=batch, cap_bytes=cap_bytes, arithmetic=ARITHMETIC, update=update
        )
        try:
            outcome = run_worker(job, TrainOutcome)
        except (CapExceededError, OutOfMemoryError) as error:
            print(f"  {key}, batch {batch}: {error}", flush=True)
            return None
        self.enforcers.add(outcome.memory.enforced_by)
        choice = outcome.plan.choice
        self.plans[f"{key}, batch {batch}"] = (
            f"{choice.weights}, inputs in {choice.inputs}, {choice.micro_batch} at a time"
        )
        values = {
            "peak": outcome.memory.high_water_bytes,
            "read": outcome.weights_read_bytes / steps,
            "step": step_seconds(outcome.steps) if steps > 1 else outcome.steps[0].end_s,
        }
        print(f"  {key}, batch {batch}: {values}", flush=True)
        return values

    def find_largest(self) -> None:
        """Find the largest batch of each arm under each cap but the ample one, and run it once."""
        for subject in self.subjects.values():
            for cap_bytes in self.caps(subject)[:-1]:
                for update in UPDATES:
                    batch = self._largest_planned(subject, cap_bytes, update)
                    if batch and self.run(subject, cap_bytes, update, batch, 1) is not None:
                        self.largest[_key(subject, cap_bytes, update)] = batch

    def _smallest(self, subject: Subject, update: Update) -> int:
        return Planner(subject.manifest, ARITHMETIC).smallest_cap(_work(subject, update, BATCH))

    def _largest_planned(self, subject: Subject, cap_bytes: int, update: Update) -> int:
        planner = Planner(subject.manifest, ARITHMETIC)
        fitting = (
            batch
            for batch in range(ROWS, 0, -1)
            if planner.smallest_cap(_work(subject, update, batch)) <= cap_bytes
        )
        return next(fitting, 0)


def _work(subject: Subject, update: Update, batch: int) -> Work:
    return Work(batch, TOKENS, 1, subject.slices, update)


def _rounded(size: int) -> int:
    return -(-size // CAP_STEP) * CAP_STEP


def _key(subject: Subject, cap_bytes: int, update: Update) -> str:
    cap = "ample memory" if cap_bytes == AMPLE_BYTES else f"cap {cap_bytes / 1e6:.0f} MB"
    return f"{subject.name}, {cap}, {UPDATES[update]}"


def main() -> int:
    """Measure everything in turns and write the table."""
    parser = bench_parser(
        __doc__.splitlines()[0], RESULT, folder="build/bench-opponent", repetitions=3, steps=3
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    arguments = parser.parse_args()
    cores = pinned_to_cores(arguments.threads)
    subjects = _subjects(arguments.folder, arguments.threads, arguments.subjects)
    bench = CappedBench(subjects, arguments.steps)
    turns = take_turns(bench.arms(), arguments.repetitions)
    bench.find_largest()
    conditions = {
        "batch": f"{BATCH} x {TOKENS} tokens, 1 draw",
        "arithmetic": ARITHMETIC,
        "repetitions": arguments.repetitions,
        "steps": arguments.steps,
        "cores": len(cores),
        "judge": ", ".join(sorted(bench.enforcers)),
        "plans": bench.plans,
    }
    command = command_line("benchmarks.memory.against_backpropagation", "bench-opponent")
    figures = _figures(turns, bench.largest)
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _subjects(folder: Path, threads: int, names: list[str]) -> dict[str, Subject]:
    """The subjects that the exporter takes; one that it refuses is skipped, with a line that says so."""
    found: dict[str, Subject] = {}
    for name in names:
        try:
            found.update(make_subjects(folder, threads, (name,), with_adjoint=True))
        except subprocess.CalledProcessError as error:
            print(f"{name}: skipped, edge-export refused it with exit code {error.returncode}", flush=True)
    return found


def _figures(turns: dict[str, list[Readings]], largest: dict[str, int]) -> list[Figure]:
    figures: list[Figure] = []
    for key, readings in turns.items():
        if not readings:
            continue
        figures.append(figure(f"{key}: peak", "bytes", [each["peak"] for each in readings]))
        figures.append(figure(f"{key}: step", "seconds", [each["step"] for each in readings]))
        figures.append(figure(f"{key}: weights read a step", "bytes", [each["read"] for each in readings]))
        if key in largest:
            most = " (all rows at hand)" if largest[key] == ROWS else ""
            figures.append(figure(f"{key}: largest batch{most}", "examples", [largest[key]]))
    return figures


if __name__ == "__main__":
    sys.exit(main())
