"""Tensors are taken out of a weight file, and the rest stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from export.adapters.take_out import take_out


@pytest.mark.parametrize("gone", [{"b"}, {"a", "c"}, {"a", "b"}, {"absent"}])
def test_the_rest_keeps_values_dtypes_and_metadata(tmp_path: Path, gone: set[str]) -> None:
    """Whatever is taken out, the library reads the others as they were, and the file's metadata."""
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4),
        "d": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    take_out(tmp_path, "model.safetensors", frozenset(gone))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors) - gone
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            assert file.get_tensor(name).dtype == tensors[name].dtype
            assert torch.equal(file.get_tensor(name), tensors[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_index_forgets_them_and_an_empty_shard_goes(tmp_path: Path) -> None:
    """The index no longer names the tensors; a shard in which nothing stays is removed."""
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    take_out(tmp_path, "two.safetensors", frozenset({"b"}))
    assert json.loads(index.read_text())["weight_map"] == {"a": "one.safetensors"}
    assert not (tmp_path / "two.safetensors").exists()
