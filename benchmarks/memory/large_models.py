"""`make bench-large`: decoders of up to 7 B parameters, exported in bounded memory and trained under small caps.

Llama shapes with random weights, in int4. Each is exported in a fresh process under an enforced limit. Then, for each
cap, the largest model whose step the planner grants takes forward-mode steps in a fresh worker. The kernel holds the
worker to that cap. A step has one row of 256 tokens, LoRA-XS on all query and value projections, and one draw.

Published for 7 B: 6.2 GB by forward mode and 33.9 GB by backpropagation (Panchal et al. 2024, arXiv 2405.15551).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.long_rows import write_full_rows
from benchmarks.harness.measured_process import pinned_to_cores, run_measured
from benchmarks.harness.minilm import packaged_model
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.shapes import LLAMA_1B, LLAMA_7B, LLAMA_135M, LLAMA_360M, DecoderShape, write_decoder
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import Subject, export_command, opened, without_labels
from edge_runtime.errors import CapExceededError, OutOfMemoryError
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.manifest import MANIFEST, Arithmetic
from edge_runtime.worker.jobs import TrainOutcome
from edge_runtime.worker.process import run_worker

RESULT = RESULTS / "large-models.json"
#: The largest first.
SHAPES = (LLAMA_7B, LLAMA_1B, LLAMA_360M, LLAMA_135M)
CAPS = (512_000_000, 256_000_000, 128_000_000)
BATCH, TOKENS, ROWS = 1, 256, 8
#: Steps of a worker; the first only warms up.
STEPS = 2
ARITHMETIC: Arithmetic = "row_int8"
#: Memory that the exporter may take; the kernel enforces it.
EXPORT_LIMIT_BYTES = 6_000_000_000
EXPORT_TIMEOUT_S = 5400.0


@dataclass(frozen=True)
class Export:
    """What an export took.

    Attributes:
        resident_bytes: peak of resident memory.
        charged_bytes: peak of the kernel's charge; None without a cgroup.
        seconds: how long it took.
    """

    resident_bytes: int
    charged_bytes: int | None
    seconds: float


def main() -> int:
    """Export what is not there, run the steps, write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, folder="build/bench-large")
    arguments = parser.parse_args()
    pinned_to_cores(arguments.threads)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    write_full_rows(rows, packaged_model() / "tokenizer.json", TOKENS, ROWS)
    texts = without_labels(rows)

    figures: list[Figure] = []
    subjects = {shape.name: _subject(folder, shape, texts, arguments.threads) for shape in SHAPES}
    export = Export(**json.loads(_record_of(folder, LLAMA_7B).read_text()))
    figures += list(_export_figures(export, LLAMA_7B.name))
    enforcers = set()
    for cap_bytes in CAPS:
        name, outcome = _largest(subjects, cap_bytes)
        enforcers.add(outcome.memory.enforced_by)
        figures += _step_figures(name, outcome, cap_bytes)
    conditions = {
        "step": f"batch {BATCH} x {TOKENS} tokens, LoRA-XS r=4 on query and value of every block, 1 draw, int4 package",
        "arithmetic": ARITHMETIC,
        "judge": ", ".join(sorted(enforcers)),
    }
    command = command_line("benchmarks.memory.large_models", "bench-large")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _subject(folder: Path, shape: DecoderShape, texts: Path, threads: int) -> Subject:
    """A shape's package. If it is not there, it is exported in a measured process, whose figures are kept beside it."""
    model = write_decoder(folder / _slug(shape), shape, packaged_model())
    package = folder / f"{_slug(shape)}.int4"
    if not (package / MANIFEST).exists():
        print(f"Exporting {shape.name}", flush=True)
        options = ("--task", "causal_lm", "--quant", "int4", "--sequence-limit", str(TOKENS))
        command = export_command(folder, model, texts, package, options)
        started = time.monotonic()
        measured = run_measured(command, limit_bytes=EXPORT_LIMIT_BYTES, timeout_s=EXPORT_TIMEOUT_S)
        record = {
            "resident_bytes": measured.max_resident_bytes,
            "charged_bytes": measured.cgroup_peak_bytes,
            "seconds": round(time.monotonic() - started, 1),
        }
        _record_of(folder, shape).write_text(json.dumps(record))
    return opened(shape.name, model, package, texts, threads)


def _largest(subjects: dict[str, Subject], cap_bytes: int) -> tuple[str, TrainOutcome]:
    """The largest model that takes its step under a cap, and that step.

    Raises:
        SystemExit: no model takes a step under the cap.
    """
    for name, subject in subjects.items():
        work = Work(BATCH, TOKENS, 1, subject.slices)
        needed = Planner(subject.manifest, ARITHMETIC).smallest_cap(work)
        if needed > cap_bytes * 1.05:  # the device's own floor may be a little lower
            print(
                f"{name}: predicted to need {needed / 1e6:.0f} MB, the cap is {cap_bytes / 1e6:.0f}",
                flush=True,
            )
            continue
        # A device has no more memory for preparing than for training.
        subject.prepared(ARITHMETIC, cap_bytes)
        job = subject.job(
            None, steps=STEPS, batch_size=BATCH, sequence=TOKENS, cap_bytes=cap_bytes, arithmetic=ARITHMETIC
        )
        try:
            outcome = run_worker(job, TrainOutcome)
        except (CapExceededError, OutOfMemoryError) as error:
            print(f"{name}: {error}", flush=True)
            continue
        print(
            f"{name} under {cap_bytes / 1e6:.0f} MB: {outcome.memory.high_water_bytes / 1e6:.1f} MB",
            flush=True,
        )
        return name, outcome
    raise SystemExit(f"error: no model takes a step under {cap_bytes} bytes")


def _export_figures(export: Export, name: str) -> Iterator[Figure]:
    yield figure(f"{name}: exporter's peak", "bytes", [export.resident_bytes], EXPORT_LIMIT_BYTES)
    if export.charged_bytes:
        title = f"{name}: charged by the kernel to the exporter, with the page cache, which fills its limit"
        yield figure(title, "bytes", [export.charged_bytes])
    yield figure(f"{name}: export", "seconds", [export.seconds])


def _step_figures(name: str, outcome: TrainOutcome, cap_bytes: int) -> list[Figure]:
    title = f"largest under {cap_bytes / 1e6:.0f} MB, {name}"
    memory = outcome.memory
    rows = [
        figure(f"{title}: peak", "bytes", [memory.high_water_bytes], cap_bytes),
        figure(f"{title}: predicted", "bytes", [memory.predicted_peak_bytes]),
        figure(f"{title}: step", "seconds", [outcome.steps[-1].end_s - outcome.steps[-2].end_s]),
        figure(f"{title}: weights read a step", "bytes", [outcome.weights_read_bytes // STEPS]),
    ]
    if memory.cgroup_peak_bytes:
        rows.insert(1, figure(f"{title}: charged by the kernel", "bytes", [memory.cgroup_peak_bytes]))
    return rows


def _slug(shape: DecoderShape) -> str:
    return shape.name.lower().replace(" ", "-")


def _record_of(folder: Path, shape: DecoderShape) -> Path:
    return folder / f"{_slug(shape)}.export.json"


if __name__ == "__main__":
    sys.exit(main())
