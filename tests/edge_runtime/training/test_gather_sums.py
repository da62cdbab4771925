"""The pass over a device's rows for a head in closed form, in a real worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import CapExceededError
from edge_runtime.execution.executor import Executor
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.training.feature_sums import decode_sums, form_of
from edge_runtime.training.projection import Projection
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome, TrainOutcome
from edge_runtime.worker.process import run_worker
from tests.edge_runtime.execution.test_executor import rows_of
from tests.edge_runtime.worker.test_main import data, train_job, values  # noqa: F401 - fixtures
from tests.export import tiny

BLOCKS = (0, 1, 2)
ASKED = {"head": "closed_form", "features": BLOCKS, "slices": (), "train_head": True}


def with_zero_head(prepared, values):  # noqa: F811
    """Values with a head over all blocks that starts at zero, and the manifest as such a run sees it."""
    seen = prepared.with_head(BLOCKS, "package").manifest
    head = {name: np.zeros(shape, np.float32) for name, shape in shapes([seen.head]).items()}
    return seen, {**values, **head}


@pytest.mark.parametrize("projected", [0, 128])
def test_a_worker_sums_up_what_its_rows_give(
    prepared_in,
    values,  # noqa: F811
    train_job,  # noqa: F811
    tmp_path: Path,
    projected: int,
) -> None:
    """The sums of a worker are those of the features that the executor gives row by row, or of their projections."""
    prepared = prepared_in["float"]
    seen, start = with_zero_head(prepared, values)
    (tmp_path / "state.safetensors").write_bytes(encode_values(start, seen))
    job = train_job(prepared, **ASKED, sums_projection=projected)
    outcome = run_worker(job, TrainOutcome)
    assert (outcome.examples, outcome.steps_skipped) == (8, 0)
    assert outcome.mean_loss == pytest.approx(np.log(len(seen.labels)), abs=1e-5)
    assert outcome.memory.high_water_bytes <= job.cap_bytes
    assert outcome.memory.predicted_peak_bytes > 0

    got = decode_sums(Path(job.delta_path).read_bytes(), form_of(job.task, seen))
    batch = tiny.make_text_batch(prepared.package)
    executor = Executor(prepared.with_head(BLOCKS, "package"), OnnxEngine())
    rows = [executor.sweep(start, [rows_of(batch, [row])]).features for row in range(8)]
    features = np.concatenate([row for row in rows if row is not None])
    np.testing.assert_allclose((features**2).sum(), 8 * len(BLOCKS) * 64, rtol=1e-3)
    if projected:
        features = Projection(features.shape[1], projected, job.task.seed).of(features)
    f = features.astype(np.float64)
    assert got.rows == 8
    np.testing.assert_allclose(got.gram, f.T @ f, atol=2e-3)


def test_an_evaluation_reads_the_same_blocks(prepared_in, values, train_job, data, tmp_path: Path) -> None:  # noqa: F811
    """A head over several blocks is evaluated in a worker that is told which."""
    prepared = prepared_in["float"]
    seen, start = with_zero_head(prepared, values)
    state = tmp_path / "state.safetensors"
    state.write_bytes(encode_values(start, seen))
    job = train_job(prepared, **ASKED)
    outcome = run_worker(
        EvaluateJob(
            job.package_folder,
            job.package_sha256,
            job.prepared_folder,
            str(state),
            str(data),
            16,
            job.cap_bytes,
            features=BLOCKS,
        ),
        EvaluateOutcome,
    )
    assert outcome.mean_loss == pytest.approx(np.log(len(seen.labels)), abs=1e-5)


def test_sums_that_do_not_fit_the_cap_are_refused(prepared_in, values, train_job, tmp_path: Path) -> None:  # noqa: F811
    """A cap below the plan is refused with the smallest that would do."""
    prepared = prepared_in["float"]
    seen, start = with_zero_head(prepared, values)
    (tmp_path / "state.safetensors").write_bytes(encode_values(start, seen))
    job = train_job(prepared, job={"budget_bytes": 40 << 20}, **ASKED)
    with pytest.raises(CapExceededError, match="needs a cap of"):
        run_worker(job, TrainOutcome)
