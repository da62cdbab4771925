"""Child program: one block's dual program beside its primal program, in turns, on the same real activations.

Takes a training job from standard input, and writes the seconds of every run as JSON, by number of draws; 0 draws stand
for the primal program.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.data.batches import Tokenizer, load_rows, make_batch
from edge_runtime.engines.engine import Array, LoadedProgram
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor
from edge_runtime.memory.allocator import keep_freed_memory
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import decode_values
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.worker.jobs import TrainJob

#: A program and its inputs.
Run = tuple[LoadedProgram, dict[str, Array]]
#: The second block: its hidden state carries tangents from the first.
BLOCK = 2
WARM_UP = 3


class Recorded:
    """A program that keeps the inputs it is given."""

    def __init__(self, program: LoadedProgram, runs: list[Run]) -> None:
        self._program, self._runs = program, runs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Keep the inputs, then run the program."""
        self._runs.append((self._program, dict(inputs)))
        return self._program.run(inputs)


class RecordingEngine:
    """An engine that keeps what its programs were given, in the order in which they ran."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine
        self.version = engine.version
        self.runs: list[Run] = []

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> Recorded:
        """Load a program that keeps its inputs."""
        return Recorded(self._engine.load(program, weights, outputs), self.runs)


def main() -> None:
    """Run both programs in turns."""
    draws, repetitions, rows_at_a_time = (tuple(map(int, text.split(","))) for text in sys.argv[1:4])
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=TrainJob)
    keep_freed_memory()
    runs = _record(job, draws, rows_at_a_time[0])
    seconds: dict[int, list[float]] = {key: [] for key in runs}
    for repetition in range(WARM_UP + repetitions[0]):
        for key, (program, inputs) in runs.items():
            started = time.perf_counter()
            program.run(inputs)
            if repetition >= WARM_UP:
                seconds[key].append(time.perf_counter() - started)
    json.dump(seconds, sys.stdout)


def _record(job: TrainJob, draws: Sequence[int], count: int) -> dict[int, Run]:
    """The block's program and real inputs: primal under 0, dual under each number of draws."""
    package = Package.open_known(Path(job.package_folder), job.package_sha256)
    manifest, task = package.manifest, job.task
    rows = load_rows(Path(job.data_path), manifest.labels)[:count]
    ids = Tokenizer(package.path(manifest.tokenizer), task.sequence_limit).encode(rows)
    batch = make_batch(ids, [row.label for row in rows], pad_token_id=manifest.pad_token_id)
    values = decode_values(Path(job.state_path).read_bytes(), manifest.slices)
    # Slices as they are once training has begun: exported cores are zero.
    generator = np.random.default_rng(0)
    values = {name: 0.1 * generator.standard_normal(v.shape, dtype=np.float32) for name, v in values.items()}
    specs = [manifest.slice_named(name) for name in task.slices]

    runs = {}
    engine = RecordingEngine(OnnxEngine(job.threads))
    prepared = PreparedPackage.open(package, Path(job.prepared_folder), engine.version)
    Executor(prepared, engine).sweep(values, [batch])
    runs[0] = engine.runs[BLOCK]
    executor = Executor(prepared, engine, task.slices)
    for k in draws:
        tangents = draw_tangents(msgspec.structs.replace(task, draws=k), specs, 0, range(count))
        engine.runs.clear()
        executor.sweep(values, [batch], [tangents])
        runs[k] = engine.runs[BLOCK]
    return runs


if __name__ == "__main__":
    main()
