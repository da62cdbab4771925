"""Adapters against the headers of a model folder: other sides, other blocks, other families, and layers left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edge_runtime.errors import ModelError
from export.adapters.contents import read_contents
from export.adapters.fit import check_layers, stored_model
from export.adapters.settings import Settings


def write(folder: Path, tensors: dict[str, tuple[int, ...]], file: str) -> Path:
    folder.mkdir()
    drawn = {name: torch.zeros(shape) for name, shape in tensors.items()}
    (torch.save if file.endswith(".bin") else save_file)(drawn, folder / file)
    (folder / "config.json").write_text("{}")
    return folder


def model(folder: Path, *, before: str = "", file: str = "model.safetensors", blocks: int = 2) -> Path:
    """A folder with layers of 4 inputs: q of 6 outputs and v of 2, in each block, and an embedding."""
    tensors = {f"{before}embed.weight": (9, 4)}
    for block in range(blocks):
        tensors[f"{before}layers.{block}.attn.q.weight"] = (6, 4)
        tensors[f"{before}layers.{block}.attn.v.weight"] = (2, 4)
    return write(folder, tensors, file)


def check(
    folder: Path,
    on: Path,
    modules: dict[str, tuple[int, int, int]],
    *,
    architecture: str = "x",
    **settings: object,
) -> tuple[str, ...]:
    """Check an adapter of (rank, inputs, outputs) by module."""
    factors = {f"{module}.lora_A.weight": (rank, inputs) for module, (rank, inputs, _) in modules.items()}
    factors |= {f"{module}.lora_B.weight": (outputs, rank) for module, (rank, _, outputs) in modules.items()}
    write(folder, factors, "adapter_model.safetensors")
    chosen = Settings(r=2, lora_alpha=2, base_model_name_or_path="org/base", **settings)
    return check_layers(folder, chosen, read_contents(folder), modules, stored_model(on, architecture))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("theirs", "ours"), [("model.", ""), ("", "model."), ("a.", "b.c."), ("", "")])
def test_layers_are_found_whatever_stands_before_the_blocks(
    tmp_path: Path, file: str, theirs: str, ours: str
) -> None:
    """A class with a head and one without call the list of blocks differently, and the pair belongs to both."""
    folder = model(tmp_path / "model", before=ours, file=file)
    assert check(tmp_path / "adapter", folder, {f"{theirs}layers.1.attn.q": (2, 4, 6)}) == ()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"layers.0.attn.q": (2, 8, 6)}, "a layer of 8 inputs and 6 outputs; in .* it has 4 and 6"),
        ({"layers.0.attn.q": (2, 4, 5)}, "a layer of 4 inputs and 5 outputs; in .* it has 4 and 6"),
        ({"layers.2.attn.q": (2, 4, 6)}, "adapts layers.2.attn.q, and .* has no such layer"),
        ({"h.0.attn.q": (2, 4, 6)}, "adapts h.0.attn.q, and .* has no such layer"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused_with_both(
    tmp_path: Path, modules: dict[str, tuple[int, int, int]], message: str
) -> None:
    """Another hidden size, more blocks or another family: both sides are named, and the base that the adapter names."""
    with pytest.raises(ModelError, match=f"{message}; its base_model_name_or_path is org/base"):
        check(tmp_path / "adapter", model(tmp_path / "model"), modules)


def test_transposed_layers_have_their_sides_in_turn(tmp_path: Path) -> None:
    """Where a family stores (in, out), inputs come first."""
    folder = model(tmp_path / "model")
    assert check(tmp_path / "adapter", folder, {"layers.0.attn.q": (2, 6, 4)}, architecture="gpt2") == ()


def test_a_rank_above_a_side_is_refused(tmp_path: Path) -> None:
    """A slice cannot have a rank above the smaller side of its layer, and the way out is no option of this command."""
    with pytest.raises(
        ModelError, match=r"rank 3, above the smaller side of the layer, 2, .*; merge it into"
    ):
        check(tmp_path / "adapter", model(tmp_path / "model"), {"layers.0.attn.v": (3, 4, 2)})


def test_layers_without_a_pair_are_named_and_targets_without_any_refused(tmp_path: Path) -> None:
    """peft leaves a layer without tensors as it is; a target that the model has and no pair at all is a mistake."""
    folder, one = model(tmp_path / "model"), {"m.layers.1.attn.q": (2, 4, 6)}
    assert check(tmp_path / "list", folder, one, target_modules=("q",)) == ("m.layers.0.attn.q",)
    assert (
        check(tmp_path / "absent", folder, one, target_modules=("q", "elsewhere"), layers_to_transform=1)
        == ()
    )
    assert check(tmp_path / "pattern", folder, one, target_modules=r".*\.(q|v)") == (
        "m.layers.0.attn.q",
        "m.layers.0.attn.v",
        "m.layers.1.attn.v",
    )
    with pytest.raises(ModelError, match=r"targets 'v', for which adapter_model.safetensors has no tensors"):
        check(tmp_path / "none", folder, one, target_modules=("q", "v"))
