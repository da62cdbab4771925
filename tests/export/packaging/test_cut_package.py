from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.data.batches import Row, Tokenizer, make_batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import ConfigError, ModelError
from edge_runtime.execution.executor import Executor
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.manifest import MANIFEST
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.slices import Values, decode_values, encode_values
from edge_runtime.protocol.signing import PrivateKey, generate_key
from export.cli import main
from tests.edge_runtime.bigram import HIDDEN, SLICE
from tests.edge_runtime.ranked_bigram import (
    RANK,
    A,
    B,
    prepare_here,
    start_values,
    write_ranked_bigram,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A publisher's key, the package and trained values."""
    made = tmp_path_factory.mktemp("publisher")
    key = generate_key()
    key.save(made / "key")
    write_ranked_bigram(made / "package", key)
    b = np.random.default_rng(4).standard_normal((1, HIDDEN, RANK)).astype(np.float32)
    (made / "trained").write_bytes(encode_values({**start_values(), B: b}))
    return made


def cut_to(folder: Path, rank: int, output: Path, *more: str) -> int:
    key = PrivateKey.load(folder / "key")
    given = ["--publisher-key", key.public_key, "--key", str(folder / "key"), "--output", str(output)]
    return main(["cut", str(folder / "package"), "--rank", str(rank), *given, *more])


def loss(prepared: PreparedPackage, values: Values) -> np.ndarray:
    tokenizer = Tokenizer(prepared.package.path("tokenizer.json"), 16)
    ids = tokenizer.encode([Row("the cat sat"), Row("dog ran home")], 2)
    return Executor(prepared, OnnxEngine()).sweep(values, [make_batch(ids, None, pad_token_id=0)]).loss


@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_the_command_cuts_a_package_and_what_was_trained(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """A package of any rank has the trained slices' first ranks bit for bit, and computes what the whole does at it."""
    assert cut_to(folder, rank, tmp_path / "cut", "--slices", str(folder / "trained")) == 0
    assert f"rank {rank}, {rank * 12} trainable numbers in 1 slices" in capsys.readouterr().out
    key = PrivateKey.load(folder / "key")
    made, whole = (Package.open(path, key.public_key) for path in (tmp_path / "cut", folder / "package"))
    made.verify_files()
    values = decode_values(made.path("slices.safetensors").read_bytes(), made.manifest.slices)
    trained = decode_values((folder / "trained").read_bytes(), whole.manifest.slices)
    assert values[A].tobytes() == np.ascontiguousarray(trained[A][:, :rank]).tobytes()
    assert values[B].tobytes() == np.ascontiguousarray(trained[B][:, :, :rank]).tobytes()
    for name in whole.manifest.files:
        assert name == "slices.safetensors" or made.path(name).read_bytes() == whole.path(name).read_bytes()
    held = prepare_here(whole, tmp_path / "whole").with_rank(rank)
    found = loss(prepare_here(made, tmp_path / "prepared"), values)
    assert found.tobytes() == loss(held, cut(trained, held.manifest.slices)).tobytes()
    assert (rank == RANK) == (found.tobytes() == loss(held, trained).tobytes())


def test_a_cut_package_is_planned_for_its_own_rank(folder: Path, tmp_path: Path) -> None:
    """A plan says how many ranks it holds, and holds fewer numbers; without trained values the first ones are cut."""
    assert cut_to(folder, 1, tmp_path / "cut") == 0
    whole, made = (Package.open_unsigned(path) for path in (folder / "package", tmp_path / "cut"))
    assert decode_values(made.path("slices.safetensors").read_bytes(), made.manifest.slices)[A].shape == (
        1,
        1,
        HIDDEN,
    )
    plans = [Planner(p.manifest).choose(Work(4, 8, 2, (SLICE,)), 1 << 30) for p in (whole, made)]
    assert [plan.gave_up for plan in plans] == [(), ("slices of rank 1 instead of 3",)]
    assert plans[1].peak.slices_bytes < plans[0].peak.slices_bytes


def test_a_rank_that_is_not_there_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank beyond the package's, or below one, and an output that exists are one line, and nothing is written."""
    assert cut_to(folder, 4, tmp_path / "cut") == ConfigError.exit_code
    assert "rank 4 exceeds package bigram's; take one from 1 to 3" in capsys.readouterr().err
    assert cut_to(folder, 0, tmp_path / "cut") == ConfigError.exit_code
    assert "--rank is 0, must be at least 1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    before = (folder / "package" / MANIFEST).read_bytes()
    assert cut_to(folder, 1, folder / "package") == ModelError.exit_code
    assert (folder / "package" / MANIFEST).read_bytes() == before
