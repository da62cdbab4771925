"""`make bench-skipping`: time of a step whose draws are not run before the slice that they move.

Forward mode with one slice a draw, on all-MiniLM-L6-v2 in row_int8 and on TREC's rows, with slices in the last two
blocks and in all six. Each step runs in turn as the runtime takes it, and with every draw carried from the first
trained slice on. Both give the same bits. Time is the process's own, on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.estimators.exact_gradients import BATCH, SEQUENCE, SLICE_TYPES, ExactRun
from benchmarks.estimators.methods import make_task
from benchmarks.harness.arguments import command_line
from benchmarks.harness.measured_process import pinned_to_cores
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import opened
from edge_runtime.data.examples import Examples
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.figures import plural
from edge_runtime.memory.plan import ExecutionChoice, begun_shares, preferred_micro_batch
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.protocol.messages import Directions, Task
from edge_runtime.training.forward_mode import ForwardMode
from edge_runtime.training.step import LocalWork

RESULT = RESULTS / "skipped-passes.json"
DRAWS = (1, 4, 16)
KINDS: tuple[Directions, ...] = ("one_slice", "dealt")
BLOCKS = {"last two blocks": (4, 5), "all blocks": (0, 1, 2, 3, 4, 5)}


class Unskipping(Executor):
    """Carries every draw from the first trained slice on."""

    def sweep(
        self, values: Any, micro_batches: Any, tangents: Any = None, rows: Any = None, begun: Any = None
    ) -> Sweep:
        """See :meth:`Executor.sweep`; what has begun is not looked at."""
        return super().sweep(values, micro_batches, tangents, rows)


def main() -> int:
    """Time both ways in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=Path("build/bench-estimators"), help="for the package")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    pinned_to_cores(1)
    run = ExactRun(arguments.folder, arguments.data, "TREC", SLICE_TYPES["LoRA-XS, last 2 blocks"])
    folder = run.prepared.package.folder
    subject = opened("trec", packaged_model(), folder, folder.with_suffix(".jsonl"), threads=1)
    prepared = PreparedPackage.open(
        Package.open_known(folder, subject.sha256), subject.prepared("row_int8"), OnnxEngine(1).version
    )
    rows = [run.rows[number] for number in range(64)]
    ids = run.tokenizer.encode(rows)
    examples = Examples(ids, [row.label for row in rows], run.manifest.pad_token_id, SEQUENCE)
    figures = []
    for words, blocks in BLOCKS.items():
        specs = [s for s in run.manifest.slices if any(f"layer.{block}." in s.target for block in blocks)]
        names = tuple(spec.name for spec in specs if spec.kind != "head")
        for kind, draws in product(KINDS, DRAWS):
            task = msgspec.structs.replace(make_task(names, 0, 0, 0, draws), directions=kind)
            where = f"{words}, {kind}, {plural(draws, 'draw')}"
            figures += _time(run, prepared, examples, task, where, arguments.repetitions)
        shares = begun_shares(run.manifest, names)
        share = sum(shares.values()) / len(shares)
        figures.append(figure(f"{words}: draws' passes that are left, by count", "times", [share]))
    command = command_line("benchmarks.estimators.skipped_passes", "bench-skipping")
    conditions = {"model": "all-MiniLM-L6-v2, row_int8", "step": f"{BATCH} rows of TREC, one_slice"}
    print("\n" + table(write_result(arguments.output, command, 1, figures, conditions)))
    return 0


def _time(
    run: ExactRun, prepared: PreparedPackage, examples: Examples, task: Task, words: str, repetitions: int
) -> list[Figure]:
    """Seconds of a step with and without skipping, and their ratio turn by turn."""
    choice = ExecutionChoice("resident", preferred_micro_batch(BATCH, SEQUENCE), task.draws)
    seconds: dict[type[Executor], list[float]] = {Executor: [], Unskipping: []}
    works = {
        kind: LocalWork(kind(prepared, OnnxEngine(1), task.slices), task, examples, choice)
        for kind in seconds
    }
    for turn in range(repetitions + 1):
        for kind, work in works.items():
            estimator = ForwardMode(work)
            started = time.process_time()
            for number in range(3):
                rows = np.arange(BATCH) + BATCH * number
                if estimator.step(number, run.values, rows) is None:
                    raise SystemExit("error: a step was not finite")
            if turn:
                seconds[kind].append((time.process_time() - started) / 3)
    ratios = [a / b for a, b in zip(seconds[Executor], seconds[Unskipping], strict=True)]
    return [
        figure(f"{words}: a step", "seconds", seconds[Executor]),
        figure(f"{words}: a step, over one that skips nothing", "times", ratios),
    ]


if __name__ == "__main__":
    sys.exit(main())
