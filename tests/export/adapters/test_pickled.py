"""Directories of PyTorch files, compared with what torch loads, and told without torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_runtime.errors import ModelError
from export.adapters.pickled import STORAGES, Described, describe_pickled

ROOT = Path(__file__).parents[3]


def test_shapes_and_types_are_those_that_torch_loads(tmp_path: Path) -> None:
    """Every type, views with strides, shared storages, parameters and scalars are described as torch has them."""
    tensors = {name: torch.zeros(2, 3, dtype=getattr(torch, name)) for name in STORAGES.values()}
    base = torch.arange(12.0).reshape(3, 4)
    tensors |= {
        "view": base[:, 1:3],
        "transposed": base.T,
        "scalar": torch.tensor(1.0),
        "none": torch.ones(0),
    }
    tensors["parameter"] = torch.nn.Parameter(base)
    torch.save(tensors, tmp_path / "file.bin")
    assert describe_pickled(tmp_path / "file.bin") == {
        name: Described(tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in torch.load(tmp_path / "file.bin", weights_only=True).items()
    }


@pytest.mark.parametrize("content", [[torch.ones(1)], {"x": 1}, {"x": torch.Size((1,))}, torch.ones(1)])
def test_what_is_not_a_directory_of_tensors_is_left_to_torch(tmp_path: Path, content: Any) -> None:
    """Lists, numbers and torch's other objects are not described."""
    torch.save(content, tmp_path / "file.bin")
    assert describe_pickled(tmp_path / "file.bin") is None


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02.", b"\x80\x02}", b"\x80\x02Q.", b"\x80\x02K\x01)R.", pickle.dumps({1: 2})[:-4]]
)
def test_damaged_directories_are_left_to_torch(tmp_path: Path, data: bytes) -> None:
    """No pickle, half a one, and ones that make no sense are not described, and nothing else happens."""
    with zipfile.ZipFile(tmp_path / "file.bin", "w") as archive:
        archive.writestr("file/data.pkl", data)
    assert describe_pickled(tmp_path / "file.bin") is None


@pytest.mark.parametrize("call", [os.mkdir, eval, getattr])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, call: Any) -> None:
    """A name that is neither torch's nor a dictionary's is never looked up."""

    class Code:
        def __reduce__(self) -> Any:
            return call, (str(tmp_path / "ran"),)

    torch.save({"x": Code()}, tmp_path / "file.bin")
    with pytest.raises(ModelError, match=rf"asks to run code when it is opened \(\w+\.{call.__name__}\)"):
        describe_pickled(tmp_path / "file.bin")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """Half a pair in ``adapter_model.bin`` is told with neither torch nor transformers loaded."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    torch.save(
        {"base_model.model.layers.0.q.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.bin"
    )
    script = (
        "import sys; from pathlib import Path; from export.adapters.contents import read_contents\n"
        "try:\n    read_contents(Path(sys.argv[1]))\n"
        "except Exception as error:\n    print(error, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("has lora_A of layers.0.q, but not its other factor []\n")
