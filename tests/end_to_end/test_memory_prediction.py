"""A small part of the grid of ``make bench-memory-grid``: predicted against measured peaks of real workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.memory.plan import ExecutionChoice, Planner, Work
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import Update
from edge_runtime.worker.jobs import PrepareJob, TrainJob, TrainOutcome
from edge_runtime.worker.process import ensure_prepared, run_worker
from tests.export import tiny

MIB = 1 << 20
TOKENS = 128
#: The grid's own bounds (docs/decisions/0006-memory-prediction.md).
LARGEST_ERROR, LARGEST_SHORTFALL = 0.10, 0.05


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Package:
    """Four blocks, 256 wide: large enough that weights and live tensors show beside the libraries."""
    folder = tmp_path_factory.mktemp("grid")
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024}
    model = tiny.write_model(folder / "model", max_position_embeddings=TOKENS, **sizes)
    return tiny.export(model, folder / "package", sequence_limit=TOKENS, with_adjoint=True).package


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows of more words than the sequence limit."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = " ".join(tiny.SENTENCES * 4)
    path.write_text((json.dumps({"text": text, "label": tiny.LABELS[0]}) + "\n") * 16)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "batch_size", "draws", "update"),
    [
        (ExecutionChoice("resident", 1, 1), 8, 1, "forward"),
        (ExecutionChoice("streamed", 1, 1), 8, 1, "forward"),
        (ExecutionChoice("resident", 2, 4), 8, 4, "forward"),
        (ExecutionChoice("streamed", 4, 2), 16, 4, "forward"),
        (ExecutionChoice("resident", 1, 1), 8, 1, "backprop"),
        (ExecutionChoice("streamed", 4, 1), 16, 1, "backprop"),
        (ExecutionChoice("streamed", 1, 1, "disk"), 16, 1, "backprop"),
    ],
)
def test_the_peak_is_predicted_within_the_bounds_of_the_grid(
    package, rows, tmp_path_factory, choice: ExecutionChoice, batch_size: int, draws: int, update: Update
) -> None:
    """Under a kernel limit a tenth above it, the prediction is at most 10 % over the peak and 5 % under it."""
    prepared = tmp_path_factory.getbasetemp() / "prepared-grid"
    ensure_prepared(PrepareJob(str(package.folder), package.sha256, str(prepared), 1 << 30, 2, "row_int8"))
    task = tiny.make_task(
        package, steps=2, batch_size=batch_size, draws=draws, sequence_limit=TOKENS, update=update
    )
    work = Work(batch_size, TOKENS, draws, task.slices, update)
    predicted = Planner(package.manifest, "row_int8").predict(work, choice)
    job = TrainJob(
        package_folder=str(package.folder),
        package_sha256=package.sha256,
        prepared_folder=str(prepared),
        state_path=str(package.path(package.manifest.initial_state)),
        data_path=str(rows),
        delta_path=str(prepared.with_name("change.safetensors")),
        task=task,
        cap_bytes=int(predicted.total_bytes * 1.1),
        threads=2,
        choice=choice,
    )
    memory = run_worker(job, TrainOutcome).memory
    error = memory.predicted_peak_bytes / memory.high_water_bytes - 1
    assert -LARGEST_SHORTFALL <= error <= LARGEST_ERROR, (
        f"{error:+.1%} of {memory.high_water_bytes / MIB:.0f} MiB"
    )
