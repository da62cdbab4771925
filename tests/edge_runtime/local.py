"""Local training in the test's own process: a data file, a package's rows, and one call that trains a task on them."""

from __future__ import annotations

import json
from pathlib import Path

from msgspec.structs import replace

from edge_runtime.data.batches import Row, Tokenizer
from edge_runtime.data.examples import Examples
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.prefix_cache import ExampleStore
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import Task
from edge_runtime.training.estimators import executor_of
from edge_runtime.training.loop import Trained, train_locally
from edge_runtime.training.step import LocalWork
from tests.export import tiny


def write_labelled_rows(path: Path) -> Path:
    """Eight rows of real text with labels in turn, as a device's data file."""
    rows = [{"text": text, "label": tiny.LABELS[i % 3]} for i, text in enumerate(tiny.SENTENCES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_of(prepared: PreparedPackage, texts: tuple[str, ...] = tiny.SENTENCES) -> Examples:
    """Real text with labels in turn, as a device tokenises it."""
    manifest = prepared.manifest
    ids = Tokenizer(prepared.package.path(manifest.tokenizer), 32).encode([Row(text) for text in texts])
    labels = [row % len(manifest.labels) for row in range(len(texts))]
    return Examples(ids, labels, manifest.pad_token_id, 32)


def work_of(
    prepared: PreparedPackage,
    task: Task,
    choice: ExecutionChoice | None = None,
    reference: Values | None = None,
    examples: Examples | None = None,
    cache: ExampleStore | None = None,
) -> LocalWork:
    """A task's work with its programs loaded; all examples and draws run together unless ``choice`` says otherwise."""
    choice = choice or ExecutionChoice("resident", task.batch_size, task.draws)
    executor = executor_of(task, prepared, OnnxEngine(), choice, cache)
    return LocalWork(executor, task, examples or examples_of(prepared), choice, reference)


def train(
    prepared: PreparedPackage,
    task: Task,
    values: Values,
    choice: ExecutionChoice | None = None,
    reference: Values | None = None,
    examples: Examples | None = None,
) -> Trained:
    """A task trained here; see :func:`work_of`."""
    return train_locally(work_of(prepared, task, choice, reference, examples), values)


def both_reports(
    prepared: PreparedPackage, task: Task, values: Values, **more: object
) -> tuple[Trained, Trained]:
    """A task's change reported as weights, and as scalars."""
    made = [train(prepared, replace(task, report=kind), values, **more) for kind in ("weights", "scalars")]
    return made[0], made[1]
