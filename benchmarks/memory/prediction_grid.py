"""`make bench-memory-grid`: predicted beside measured peaks over shapes, batches, sequences, draws and weights.

Each row is one fresh worker that takes two steps, held by the kernel to a cap 10 % above its prediction. What is
measured is its high-water mark (VmHWM). To reach: both within 10 % of each other, and the prediction never more than
5 % below.
"""

from __future__ import annotations

import json
import sys
from itertools import product

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.measured_process import pinned_to_cores, python_program, run_measured
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.shapes import BERT_BASE, BERT_LARGE
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import MINILM, Subject, make_subjects
from edge_runtime.memory.plan import ExecutionChoice, Planner, WeightsMode, Work
from edge_runtime.worker.jobs import TrainOutcome
from edge_runtime.worker.process import run_worker

RESULT = RESULTS / "memory-grid.json"
#: (batch, sequence, micro-batch, draws, draws at a time)
SIZES = (
    (8, 128, 1, 1, 1),
    (8, 128, 2, 1, 1),
    (8, 128, 1, 4, 4),
    (8, 128, 1, 4, 1),
    (16, 64, 4, 2, 2),
    (2, 32, 2, 1, 1),
)
MODES: tuple[WeightsMode, ...] = ("resident", "streamed")
LARGEST_ERROR, LARGEST_SHORTFALL = 0.10, 0.05
CAP_OVER_PREDICTION = 1.1
BLOCK_GROWTH_BYTES = 9_000_000


def main() -> int:
    """Measure the grid and write its table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT)
    parser.add_argument(
        "--parts", action="store_true", help="print the parts of each prediction beside its measure"
    )
    arguments = parser.parse_args()
    pinned_to_cores(arguments.threads)
    subjects = make_subjects(arguments.folder, arguments.threads, (MINILM, BERT_BASE.name, BERT_LARGE.name))
    rows, errors, enforcers = [], [], set()
    for (name, subject), weights, size in product(subjects.items(), MODES, SIZES):
        predicted, outcome = _measure(subject, weights, size)
        measured = outcome.memory.high_water_bytes
        errors.append(predicted / measured - 1)
        enforcers.add(outcome.memory.enforced_by)
        batch, sequence, micro_batch, draws, at_a_time = size
        title = f"{name}, {weights}, {batch} × {sequence} by {micro_batch}, {draws} draws by {at_a_time}"
        rows.append(figure(f"{title}: predicted {predicted / 1e6:.1f} MB", "bytes", [measured]))
        print(
            f"{title}: predicted {predicted / 1e6:.1f}, measured {measured / 1e6:.1f} MB, {errors[-1]:+.1%}",
            flush=True,
        )
        if arguments.parts:
            found = {part.name: part.measured_bytes for part in outcome.bins}
            for part, size_bytes in outcome.plan.peak.parts.items():
                print(f"    {part:10} {size_bytes / 1e6:8.1f} {found.get(part, 0) / 1e6:8.1f}")
    summary = [
        figure("largest overestimate", "%", [round(100 * max(errors), 1)], 100 * LARGEST_ERROR),
        figure("largest underestimate", "%", [round(-100 * min(errors), 1)], 100 * LARGEST_SHORTFALL),
    ]
    summary += _growth(subjects[BERT_BASE.name])
    conditions = {"configurations": len(rows), "judge": ", ".join(sorted(enforcers))}
    command = command_line("benchmarks.memory.prediction_grid", "bench-memory-grid")
    document = write_result(arguments.output, command, arguments.threads, [*summary, *rows], conditions)
    print("\n" + table(document))
    return 0


def _growth(subject: Subject) -> list[Figure]:
    """Growth of anonymous memory by one block's dual program, 1 × 128 tokens and one draw, in the worker's arena."""
    program = subject.manifest.programs[str(subject.manifest.segments[1].dual)].variants["row_int8"]
    command = python_program("benchmarks.memory.live_sets", subject.package / program.file)
    found = json.loads(run_measured([*command, "--sizes", "1x128x1", "--measure", "arena"]).output)
    title = f"growth of a dual block of {subject.name}, 1 × 128, 1 draw"
    return [
        figure(f"{title}: {when}", "bytes", [int(found[key] * 1e6)], BLOCK_GROWTH_BYTES)
        for key, when in (("first", "first run"), ("later", "after five more"))
    ]


def _measure(subject: Subject, weights: WeightsMode, size: tuple[int, ...]) -> tuple[int, TrainOutcome]:
    """Predicted peak in bytes, and what a worker did under a cap just above it."""
    batch, sequence, micro_batch, draws, at_a_time = size
    choice = ExecutionChoice(weights, micro_batch, at_a_time)
    work = Work(batch, sequence, draws, subject.slices)
    cap_bytes = int(Planner(subject.manifest).predict(work, choice).total_bytes * CAP_OVER_PREDICTION)
    job = subject.job(choice, draws=draws, steps=2, batch_size=batch, sequence=sequence, cap_bytes=cap_bytes)
    outcome = run_worker(job, TrainOutcome)
    return outcome.memory.predicted_peak_bytes, outcome


if __name__ == "__main__":
    sys.exit(main())
