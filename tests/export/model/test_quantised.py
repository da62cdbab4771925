"""Formats of weights that are quantised already."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError, ModelError
from export.model.quantised import fp8_scales, refuse_quantised
from export.model.weight_files import StoredTensor

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}


def stored(dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(Path("model.safetensors"), dtype, shape)


@pytest.mark.parametrize("scale", ["weight_scale_inv", "scale", "qscale_weight"])
def test_the_scales_that_transformers_knows_are_found(scale: str) -> None:
    """An FP8 matrix is paired with the scales beside it under each name that transformers renames; floats are not."""
    tensors = {
        "a.weight": stored("F8_E4M3", 8, 8),
        f"a.{scale}": stored("F32", 2, 2),
        "b.weight": stored("F32", 8, 8),
        "b.scale": stored("F32", 8),
    }
    assert fp8_scales(tensors) == {"a.weight": f"a.{scale}"}


@pytest.mark.parametrize(
    ("shape", "scale"), [((8, 8), (2, 2)), ((3, 8), (1, 2)), ((4, 4), (1, 1)), ((2, 3), (1, 1))]
)
def test_whole_blocks_are_dequantised(tmp_path: Path, shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    """A grid of whole blocks, or one block for a side shorter than a block, is let through."""
    tensors = {"a.weight": stored("F8_E4M3", *shape), "a.weight_scale_inv": stored("F32", *scale)}
    refuse_quantised(tmp_path, FP8, tensors)


@pytest.mark.parametrize(
    ("shape", "scale"), [((6, 8), (2, 2)), ((8, 8), (4, 4)), ((8, 8), (2,)), ((8, 8), ())]
)
def test_other_grids_are_refused(tmp_path: Path, shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    """Blocks that do not divide a side would be dequantised with other scales than they were made with."""
    tensors = {"a.weight": stored("F8_E4M3", *shape), "a.weight_scale_inv": stored("F32", *scale)}
    with pytest.raises(ModelError, match=r"a\.weight .* is not whole blocks of \[4, 4\]"):
        refuse_quantised(tmp_path, FP8, tensors)


def test_the_other_fp8_type_is_refused(tmp_path: Path) -> None:
    """E5M2 codes are named by their type."""
    tensors = {"a.weight": stored("F8_E5M2", 8, 8), "a.weight_scale_inv": stored("F32", 2, 2)}
    with pytest.raises(ModelError, match=r"a\.weight cannot be read: it is F8_E5M2"):
        refuse_quantised(tmp_path, FP8, tensors)


def test_a_matrix_in_yet_another_format_is_refused(tmp_path: Path) -> None:
    """Beside FP8, packed bytes are told by name and type."""
    tensors = {"a.weight": stored("U8", 8, 4)}
    with pytest.raises(ModelError, match=r"a\.weight \(U8\) belongs to no FP8 matrix"):
        refuse_quantised(tmp_path, FP8, tensors)


def test_scales_of_activations_are_let_through(tmp_path: Path) -> None:
    """transformers' dequantisation drops the scales of activations, and so does the exporter."""
    tensors = {
        "a.weight": stored("F8_E4M3", 8, 8),
        "a.weight_scale_inv": stored("F32", 2, 2),
        "a.activation_scale": stored("F32"),
    }
    refuse_quantised(tmp_path, FP8, tensors)


def test_fp8_needs_the_library_that_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without accelerate, transformers loads no FP8: refused with the install command."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        refuse_quantised(tmp_path, FP8, {"a.weight": stored("F32", 8, 8)})


def test_a_quantisation_of_a_part_is_seen(tmp_path: Path) -> None:
    """A text model within a larger configuration may carry the description."""
    with pytest.raises(ModelError, match="in AWQ"):
        refuse_quantised(tmp_path, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, {})


@pytest.mark.parametrize(
    ("name", "said"), [("some/float-model", ", some/float-model"), (None, ""), ("/data/here", "")]
)
def test_the_float_model_is_named_where_config_knows_it(tmp_path: Path, name: str | None, said: str) -> None:
    """_name_or_path tells what a model was made from, unless it is the folder itself."""
    folder = tmp_path / "here"
    folder.mkdir()
    config = {"quantization_config": {"quant_method": "gptq"}, "_name_or_path": name}
    with pytest.raises(ModelError) as caught:
        refuse_quantised(folder, config, {})
    assert str(caught.value).endswith(f"export the float model it was made from{said}")


@pytest.mark.parametrize("name", ["layer_scale.weight", "logit_scale", "norm.scale", "embed_scale"])
def test_floats_called_scale_are_no_quantisation(tmp_path: Path, name: str) -> None:
    """Models have parameters of such names; only types and known companions tell codes."""
    refuse_quantised(tmp_path, {}, {name: stored("F32", 4)})
