"""`make bench-arithmetic`: which arithmetic gives the best gradient estimate for its time, on real weights and text.

all-MiniLM-L6-v2, 8 rows of 128 tokens, all slices. The exact gradient comes from torch on the same quantised weights.
Each arithmetic estimates it many times, from the same tangents; a step's time is that of the whole sweep. The cosine of
an estimate grows with the root of the number of draws, so cosine² per second does not depend on it.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import mean, median

import msgspec
import numpy as np

from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.long_rows import LABELS
from benchmarks.harness.measured_process import pinned_to_cores
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.tables import table
from benchmarks.memory.subjects import MINILM, TOKENS, Subject, make_subjects
from edge_runtime.data.batches import Batch, Tokenizer, load_rows, make_batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.memory.allocator import keep_freed_memory
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values
from edge_runtime.training.gradient import estimate
from edge_runtime.training.tangents import draw_tangents

RESULT = RESULTS / "arithmetic.json"
BATCH = 8
#: Slices are moved off their initial zeros by this, so that every path carries signal.
PERTURBATION = 0.02


def main() -> int:
    """Measure all arithmetics in turns and write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, repetitions=40)
    arguments = parser.parse_args()
    pinned_to_cores(arguments.threads)
    keep_freed_memory()
    subject = make_subjects(arguments.folder, arguments.threads, (MINILM,))[MINILM]
    batch, values = _batch(subject), _values(subject)
    exact_loss, exact = _exact(subject, batch, values)
    engine = OnnxEngine(arguments.threads)
    package = Package.open_known(subject.package, subject.sha256)
    executors = {
        name: Executor(
            PreparedPackage.open(package, subject.prepared(name), engine.version), engine, subject.slices
        )
        for name in subject.manifest.arithmetics
    }
    figures = []
    for draws in (1, 4):
        figures += _compare(
            subject,
            executors,
            batch,
            values,
            (exact_loss, exact),
            draws=draws,
            repetitions=arguments.repetitions,
        )
    conditions = {
        "model": "all-MiniLM-L6-v2",
        "batch": f"{BATCH} x {TOKENS} tokens",
        "repetitions": arguments.repetitions,
    }
    command = command_line("benchmarks.kernels.arithmetic", "bench-arithmetic")
    document = write_result(arguments.output, command, arguments.threads, figures, conditions)
    print("\n" + table(document))
    return 0


def _compare(
    subject: Subject,
    executors: dict[Arithmetic, Executor],
    batch: Batch,
    values: Values,
    exact: tuple[float, np.ndarray],
    *,
    draws: int,
    repetitions: int,
) -> list[Figure]:
    """Figures of every arithmetic, which take turns on the same tangents.

    Args:
        subject: model and package.
        executors: executor of each arithmetic.
        batch: rows to run.
        values: values of slices and head.
        exact: mean loss and gradient by torch.
        draws: draws of a sweep.
        repetitions: number of turns.
    """
    manifest = subject.manifest
    specs = [manifest.slice_named(name) for name in subject.slices]
    task = msgspec.structs.replace(subject.job(None).task, draws=draws)
    halves = [[0, 1], [2, 3], [4, 5], [6, 7]]
    batches = [Batch(batch.input_ids[h], batch.attention_mask[h], batch.labels[h]) for h in halves]
    cosines: dict[Arithmetic, list[float]] = {name: [] for name in executors}
    agreement: dict[Arithmetic, list[float]] = {name: [] for name in executors}
    seconds: dict[Arithmetic, list[float]] = {name: [] for name in executors}
    losses: dict[Arithmetic, float] = {}
    for step in range(repetitions):
        tangents = [draw_tangents(task, specs, step, half) for half in halves]
        joined = {name: np.concatenate([t[name] for t in tangents], axis=1) for name in tangents[0]}
        jvps = {}
        for name, executor in executors.items():
            started = time.perf_counter()
            sweep = executor.sweep(values, batches, tangents)
            seconds[name].append(time.perf_counter() - started)
            losses[name] = float(sweep.loss.mean())
            jvps[name] = sweep.jvps
            if sweep.jvps is not None:
                cosines[name].append(_cosine(_flat(estimate(sweep.jvps, joined)), exact[1]))
        for name, found in jvps.items():
            agreement[name].append(_cosine(found.ravel(), jvps["float"].ravel()))
    figures = []
    for name in executors:
        title = f"{name}, {draws} draw{'s' * (draws > 1)}"
        cosine, time_s = mean(cosines[name]), median(seconds[name])
        figures += [
            figure(f"{title}: cosine of an estimate to the exact gradient (mean)", "", [cosine]),
            figure(f"{title}: cosine of its jvps to float arithmetic's", "", agreement[name]),
            figure(f"{title}: sweep", "seconds", seconds[name]),
            figure(f"{title}: cosine² per second", "", [mean(c * c for c in cosines[name]) / time_s]),
            figure(f"{title}: loss over torch's", "times", [losses[name] / exact[0]]),
        ]
    return figures


def _batch(subject: Subject) -> Batch:
    manifest = subject.manifest
    rows = load_rows(subject.rows, manifest.labels)[:BATCH]
    ids = Tokenizer(subject.package / manifest.tokenizer, TOKENS).encode(rows)
    return make_batch(ids, [row.label for row in rows], pad_token_id=manifest.pad_token_id)


def _values(subject: Subject) -> Values:
    from edge_runtime.package.slices import decode_values

    start = decode_values(
        (subject.package / subject.manifest.initial_state).read_bytes(), subject.manifest.slices
    )
    generator = np.random.default_rng(0)
    return {
        name: (value + PERTURBATION * generator.standard_normal(value.shape)).astype(np.float32)
        for name, value in start.items()
    }


def _exact(subject: Subject, batch: Batch, values: Values) -> tuple[float, np.ndarray]:
    """Mean loss, and the gradient of all slices as one vector, by torch."""
    from benchmarks.harness.torch_gradient import slice_gradient
    from export.model.load import load_model
    from export.model.slices import SliceOptions
    from export.packaging.torch_reference import TorchReference
    from export.quantisation.stored import store

    labels = json.loads(LABELS.read_text())
    stored = store(load_model(subject.model, len(labels), SliceOptions()), "int8")
    reference = TorchReference(stored.segments, stored.in_memory())
    outputs, gradient = slice_gradient(reference, batch, values, subject.slices)
    return float(outputs["loss"].mean().detach()), _flat(gradient)


def _flat(gradient: Values) -> np.ndarray:
    return np.concatenate([gradient[name].ravel() for name in sorted(gradient)])


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
    sys.exit(main())
