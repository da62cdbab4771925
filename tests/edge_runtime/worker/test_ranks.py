"""A worker process that trains fewer ranks than its package has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load_file

from edge_runtime.errors import ConfigError, SliceError
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.signing import generate_key
from edge_runtime.worker.jobs import TrainJob, TrainOutcome
from edge_runtime.worker.process import run_worker
from tests.edge_runtime.bigram import HIDDEN
from tests.edge_runtime.local import train
from tests.edge_runtime.ranked_bigram import A, B, prepare_here, start_values, write_ranked_bigram
from tests.edge_runtime.training.test_step_rank import TEXTS, examples_of, make_task


def test_a_worker_trains_the_ranks_that_its_task_names(tmp_path: Path) -> None:
    """A task of one rank comes with values of it and ends in a change of it, the same as here; others are refused."""
    bigram = write_ranked_bigram(tmp_path / "package", generate_key())
    prepared = prepare_here(bigram.package, tmp_path / "prepared")
    b = np.random.default_rng(9).standard_normal((1, HIDDEN, 3)).astype(np.float32)
    values = cut({**start_values(), B: b}, prepared.with_rank(1).manifest.slices)
    (tmp_path / "state").write_bytes(encode_values(values))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    task = make_task(steps=3, draws=2, directions="one_slice", rank=1, package=bigram.package.sha256)
    job = TrainJob(
        str(bigram.package.folder),
        bigram.package.sha256,
        str(prepared.folder),
        str(tmp_path / "state"),
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "change"),
        task,
        1 << 30,
    )
    outcome = run_worker(job, TrainOutcome)
    assert outcome.plan.gave_up[0] == "slices of rank 1 instead of 3"
    change = load_file(tmp_path / "change")
    expected = train(prepared.with_rank(1), task, values, examples=examples_of(bigram)).delta
    assert change[A].shape == (1, 1, HIDDEN)
    for name, array in change.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)
    (tmp_path / "change").unlink()
    with pytest.raises(SliceError, match=r"is float32\(1, 1, 6\), expected float32\(1, 2, 6\)"):
        run_worker(replace(job, task=replace(task, rank=2)), TrainOutcome)
    with pytest.raises(ConfigError, match="rank 4 exceeds package bigram's; take one from 1 to 3"):
        run_worker(replace(job, task=replace(task, rank=4)), TrainOutcome)
    assert not (tmp_path / "change").exists()
