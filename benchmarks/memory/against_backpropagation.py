"""`make bench-opponent`: forward mode beside checkpointed backpropagation, on the same engine, package and caps.

Both run the same primal programs on the same int8 weights; backpropagation adds the adjoint programs, keeps each
block's input and reads every weight twice. Under each cap each plans for itself, and the kernel holds it to the cap:
the smallest caps that the planner grants to either, and an ample one. A cap that one of them cannot work in is a row
of the other alone. The largest batch is the largest that was planned under the cap and then ran, up to the rows at
hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.harness.measured_process import pinned_to_cores
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.shapes import BERT_BASE, LLAMA_1B
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import AMPLE_BYTES, MINILM, ROWS, TOKENS, Subject, make_subjects
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
#: Caps are rounded up to these steps, so that a floor measured a little higher does not refuse a smallest cap.
CAP_STEP = 4_000_000
#: What one arm gave in one turn: ``peak`` and ``read`` in bytes, ``step`` in seconds.
Values = dict[str, float]


class Bench:
    """Runs arms under caps and keeps what they gave, turn by turn."""

    def __init__(self, subjects: dict[str, Subject], steps: int) -> None:
        self.subjects = subjects
        self.steps = steps
        self.turns: dict[str, list[Values]] = defaultdict(list)
        self.largest: dict[str, int] = {}
        self.plans: dict[str, str] = {}
        self.enforcers: set[str] = set()

    def caps(self, subject: Subject) -> list[int]:
        """The smallest cap of either way to train at this batch, and an ample one, in bytes."""
        return [*sorted({_rounded(self._smallest(subject, update)) for update in UPDATES}), AMPLE_BYTES]

    def arm(self, subject: Subject, cap_bytes: int, update: Update, batch: int, steps: int) -> Values | None:
        """One worker that plans for itself under a cap; None, and a line, where it refuses or is killed."""
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
        ends = [step.end_s for step in outcome.steps]
        values = {
            "peak": outcome.memory.high_water_bytes,
            "read": outcome.weights_read_bytes / steps,
            "step": median(after - before for before, after in pairwise(ends)) if steps > 1 else ends[0],
        }
        print(f"  {key}, batch {batch}: {values}", flush=True)
        return values

    def turn(self) -> None:
        """Every arm once."""
        for subject in self.subjects.values():
            for cap_bytes in self.caps(subject):
                for update in UPDATES:
                    values = self.arm(subject, cap_bytes, update, BATCH, WARM_UP_STEPS + self.steps)
                    if values is not None:
                        self.turns[_key(subject, cap_bytes, update)].append(values)

    def find_largest(self) -> None:
        """The largest batch of each arm under each cap but the ample one, run once."""
        for subject in self.subjects.values():
            for cap_bytes in self.caps(subject)[:-1]:
                for update in UPDATES:
                    batch = self._largest_planned(subject, cap_bytes, update)
                    if batch and self.arm(subject, cap_bytes, update, batch, 1) is not None:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-opponent"), help="for models and packages"
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    cores = pinned_to_cores(arguments.threads)
    subjects = _subjects(arguments.folder, arguments.threads, arguments.subjects)
    bench = Bench(subjects, arguments.steps)
    for turn in range(arguments.repetitions):
        print(f"Turn {turn + 1} of {arguments.repetitions}", flush=True)
        bench.turn()
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
    command = (
        " ".join(["python -m benchmarks.memory.against_backpropagation", *sys.argv[1:]])
        if sys.argv[1:]
        else "make bench-opponent"
    )
    document = write_result(arguments.output, command, arguments.threads, _figures(bench), conditions)
    print("\n" + table(document))
    return 0


def _subjects(folder: Path, threads: int, names: list[str]) -> dict[str, Subject]:
    """Those that the exporter takes; one that it refuses is skipped, and said."""
    found: dict[str, Subject] = {}
    for name in names:
        try:
            found.update(make_subjects(folder, threads, (name,), with_adjoint=True))
        except subprocess.CalledProcessError as error:
            print(f"{name}: skipped, edge-export refused it with exit code {error.returncode}", flush=True)
    return found


def _figures(bench: Bench) -> list[Figure]:
    figures: list[Figure] = []
    for key, turns in bench.turns.items():
        figures.append(figure(f"{key}: peak", "bytes", [v["peak"] for v in turns]))
        figures.append(figure(f"{key}: step", "seconds", [v["step"] for v in turns]))
        figures.append(figure(f"{key}: weights read a step", "bytes", [v["read"] for v in turns]))
        if key in bench.largest:
            most = " (all rows at hand)" if bench.largest[key] == ROWS else ""
            figures.append(figure(f"{key}: largest batch{most}", "examples", [bench.largest[key]]))
    return figures


if __name__ == "__main__":
    sys.exit(main())
