"""Which weight files are read, and what their headers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edge_runtime.errors import ModelError
from export.model.weight_files import equal_bytes, find_weights, listed, read_headers


def write(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, path, {"format": "pt"})


def test_headers_say_type_shape_and_place(tmp_path: Path) -> None:
    """Of each tensor the header has element type and shape, and the bytes at its place are its values."""
    a, b = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)
    write(tmp_path / "model.safetensors", a=a, b=b)
    found = read_headers(find_weights(tmp_path, {}))
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }
    data = (tmp_path / "model.safetensors").read_bytes()
    assert data[found["a"].start : found["a"].end] == a.numpy().tobytes()


def test_files_are_looked_for_as_transformers_does(tmp_path: Path) -> None:
    """A whole file comes before an index, safetensors before pickles, and a file that config.json names before all."""
    index = {"metadata": {}, "weight_map": {"a": "shard.safetensors"}}
    write(tmp_path / "shard.safetensors", a=torch.ones(1))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    chosen = []
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"):
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(index))
        elif name.endswith(".safetensors"):
            write(tmp_path / name, a=torch.ones(1))
        chosen.append([path.name for path in find_weights(tmp_path, {}).files])
    assert chosen == [["pytorch_model.bin"], ["shard.safetensors"], ["model.safetensors"]]
    named = find_weights(tmp_path, {"transformers_weights": "shard.safetensors"})
    assert [path.name for path in named.files] == ["shard.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a.bin", 3, ""])
def test_config_may_name_a_file_of_the_folder_alone(tmp_path: Path, name: object) -> None:
    """A name that leaves the folder, or of another format, is refused."""
    with pytest.raises(ModelError, match=r"must name a \.safetensors file of the folder"):
        find_weights(tmp_path, {"transformers_weights": name})


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (torch.zeros(3), True),
        (torch.tensor([0.0, 0.0, 1e-9]), False),
        (torch.zeros(3, 1), False),
        (torch.zeros(6, dtype=torch.float16), False),
    ],
)
def test_tensors_are_equal_in_type_shape_and_bytes(tmp_path: Path, other: torch.Tensor, equal: bool) -> None:
    """A value that differs in its last place, another shape, or another type with the same bytes: not equal."""
    write(tmp_path / "model.safetensors", a=torch.zeros(3), b=other)
    found = read_headers(find_weights(tmp_path, {}))
    assert equal_bytes(found["a"], found["b"]) is equal


def test_long_lists_are_cut() -> None:
    """Three names, in order, and how many more there are."""
    assert listed(["c", "a"]) == "a, c"
    assert listed("edcba") == "a, b, c and 2 more"
