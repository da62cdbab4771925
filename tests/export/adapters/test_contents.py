"""Adapter files: what names peft and training tools write, PyTorch files, and files that are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edge_runtime.errors import ModelError
from export.adapters.contents import as_floats, read_contents, read_values

A, B = torch.arange(8.0).reshape(2, 4), torch.ones(6, 2)
MODULE = "model.layers.0.self_attn.q_proj"
SAFE, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


def pair(name: str = f"base_model.model.{MODULE}.lora_X.weight") -> dict[str, torch.Tensor]:
    """Both factors of a module; X in the name stands for A and B."""
    return {name.replace("lora_X", "lora_A"): A, name.replace("lora_X", "lora_B"): B}


def refuse(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_contents(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{MODULE}.lora_X.weight",
        f"base_model.model.{MODULE}.lora_X.default.weight",
        f"base_model.model.{MODULE}.lora_X.my-run.weight",
        f"base_model.model.{MODULE}.lora_X.default",
        f"base_model.model.{MODULE}.lora_X",
        f"_orig_mod.base_model.model.{MODULE}.lora_X.weight",
        f"base_model.model._orig_mod.{MODULE}.lora_X.default.weight",
        f"module.base_model.model.{MODULE}.lora_X.weight",
        f"module._orig_mod.base_model.model.{MODULE}.lora_X.weight",
        "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_X.weight",
        "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_X.weight",
        f"base_model.model.base_model.model.{MODULE}.lora_X.weight",
        f"{MODULE}.lora_X.weight",
    ],
)
@pytest.mark.parametrize("file", [SAFE, PICKLED])
def test_names_lead_to_the_module(tmp_path: Path, name: str, file: str) -> None:
    """Whatever peft, torch.compile, DDP, FSDP or checkpointing put into a name, the pair is found under its module."""
    (torch.save if file == PICKLED else save_file)(pair(name), tmp_path / file)
    contents = read_contents(tmp_path)
    assert list(contents.factors) == [MODULE]
    parts = contents.factors[MODULE]
    assert (parts["lora_A"].shape, parts["lora_B"].shape) == ((2, 4), (6, 2))
    values = read_values(contents.path, [parts["lora_A"].stored])
    np.testing.assert_array_equal(as_floats(values[parts["lora_A"].stored]), A.numpy())


def test_saved_modules_lose_the_name_of_their_wrapper(tmp_path: Path) -> None:
    """A classifier is named alike whether peft saved it or a raw state dict was."""
    extra = {
        "base_model.model.score.modules_to_save.default.weight": B + 1,
        "base_model.model.classifier.bias": A + 1,
    }
    save_file(pair() | extra, tmp_path / SAFE)
    assert set(read_contents(tmp_path).others) == {"score.weight", "classifier.bias"}


def test_every_floating_type_is_widened(tmp_path: Path) -> None:
    """float16, bfloat16 and float64 become float32 with the same numbers."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({name: tensor.to(dtype) for name, tensor in pair().items()}, tmp_path / SAFE)
        header = read_contents(tmp_path).factors[MODULE]["lora_A"]
        array = as_floats(read_values(tmp_path / SAFE, [header.stored])[header.stored])
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, A.numpy())


def test_of_two_files_the_one_that_peft_takes_is_read(tmp_path: Path) -> None:
    """With both files in a folder the safetensors one is read, and the other is reported."""
    save_file(pair(), tmp_path / SAFE)
    torch.save({}, tmp_path / PICKLED)
    contents = read_contents(tmp_path)
    assert (contents.path.name, contents.passed_over) == (SAFE, tmp_path / PICKLED)


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    """A PyTorch file from before archives is read too, though it cannot be mapped."""
    torch.save(pair(), tmp_path / PICKLED, _use_new_zipfile_serialization=False)
    assert list(read_contents(tmp_path).factors) == [MODULE]


class Code:
    """Pickles to a call of a function that would leave a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_asks_for_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    """The refusal names the function, and it was not called; the same adapter saved as safetensors is taken."""
    torch.save(pair() | {"x": Code(tmp_path / "ran")}, tmp_path / PICKLED)
    message = refuse(tmp_path)
    assert "asks to run code when it is opened (posix.mkdir); none was run" in message
    assert "save the adapter as adapter_model.safetensors" in message
    assert not (tmp_path / "ran").exists()
    save_file(pair(), tmp_path / SAFE)
    read_contents(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors; the training saved none of its adapter"),
        (pair() | {"x": [1]}, "holds something beside tensors by name"),
        ([A], "holds something beside tensors by name"),
        ({"x.lora_A.weight": A}, "has lora_A of x, but not its other factor"),
        ({"x.weight": A}, "holds x.weight; only base_model.model.MODULE.lora_A.weight and"),
        (pair() | {"y": torch.ones(2, dtype=torch.int64)}, "holds y as torch.int64; adapters are floating point"),
        (pair() | pair(f"{MODULE}.lora_X.weight"), "holds one tensor under two names, base_model.model.model.layers"),
        (pair("x.lora_X.one.weight") | pair("y.lora_X.two.weight"), "holds tensors of 2 adapters, one and two"),
    ],
    ids=range(8),
)  # fmt: skip
def test_files_that_hold_no_one_adapter_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    """No tensors, other objects, half a pair, integers, one tensor twice, two adapters: each by name, in one line."""
    torch.save(content, tmp_path / PICKLED)
    assert message in refuse(tmp_path)


def test_damaged_and_replaced_files_are_refused(tmp_path: Path) -> None:
    """No file at all, a cut one, and git's pointer in the place of a large file."""
    assert "it has neither adapter_model.safetensors nor adapter_model.bin" in refuse(tmp_path)
    torch.save(pair(), tmp_path / PICKLED)
    whole = (tmp_path / PICKLED).read_bytes()
    (tmp_path / PICKLED).write_bytes(whole[: len(whole) // 2])
    assert PICKLED in refuse(tmp_path)
    for name in (PICKLED, SAFE):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert "is what git keeps in the place of a large file" in refuse(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """A NaN is told when values are read, with the tensor's name."""
    torch.save({"x": torch.full((2,), torch.nan)}, tmp_path / PICKLED)
    with pytest.raises(ModelError, match=r"weight x of .* holds 2 values that are not finite"):
        read_values(tmp_path / PICKLED, ["x"])
