"""Whether a folder's weights are quantised already; told from its files without torch.

A package quantises the model's own weights. Codes that are read as weights give another model, so a folder in another
format is refused. FP8 in blocks is an exception: each weight is its code times its scale, which float32 holds.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, ModelError
from export.model.weight_files import StoredTensor

#: Formats as people call them, by ``quant_method``.
METHODS = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FBGEMM FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "torchao": "torchao",
}
#: Formats that transformers can undo itself, given the library of the same name.
UNDONE = ("bitsandbytes",)
#: Other files that say how a folder is quantised, and of which format.
CONFIGS = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "qmodel.pt": "HQQ",
    "quanto_qmap.json": "quanto",
}
#: Names of tensors that a quantised matrix consists of, by format; the first that fits is meant.
PARTS = (
    (re.compile(r"\.(absmax|quant_map|nested_absmax|quant_state\..*)$"), "bitsandbytes 4-bit"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes 8-bit"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\._packed_params(\.|$)"), "torch int8"),
    (
        re.compile(r"\.(weight_packed|weight_shape|weight_zero_point|weight_global_scale)$"),
        "compressed-tensors",
    ),
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (
        re.compile(r"(weight\._data|weight\._scale|weight\.\w+:?_(data|scale)|\.(input|output)_scale)$"),
        "quanto",
    ),
    (re.compile(r"weight(:|_)_?(qdata|tensor_impl|zero_point)"), "torchao"),
    (re.compile(r"\.scales$"), "MLX"),
    (re.compile(r"(weight_scale|weight_scale_2|scale_inv|scale_weight|zero_point)$"), "codes with scales"),
)
#: Names of the scales that transformers finds beside an FP8 matrix ``….weight``.
FP8_SCALES = ("weight_scale_inv", "scale", "qscale_weight")
ACTIVATION_SCALE = ".activation_scale"
FP8_TYPE, FLOATS = "F8_E4M3", frozenset(("F64", "F32", "F16", "BF16"))
BASE_IN_README = re.compile(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)
README_BYTES = 1 << 16


def refuse_quantised(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that are quantised, unless they are FP8 that can be dequantised exactly.

    Args:
        folder: model folder.
        config: content of its config.json.
        tensors: tensors of its weight files; empty if only torch can read them.

    Raises:
        ModelError: they are quantised; the message names the format and a way out.
        ConfigError: they are FP8, and transformers lacks the library with which it loads such.
    """
    described = _described(config)
    codes = sorted(name for name, tensor in tensors.items() if tensor.dtype.startswith("F8_"))
    if described is not None and described.get("quant_method") == "fp8":
        _check_fp8(folder, config, described, tensors)
        return
    if described is not None:
        raise ModelError(_sentence(folder, config, _name(described), "quantization_config of config.json"))
    if config.get("quantization") is not None:
        raise ModelError(_sentence(folder, config, "MLX", "quantization of config.json"))
    for file, named in CONFIGS.items():
        if (folder / file).is_file():
            raise ModelError(_sentence(folder, config, named, file))
    if codes:
        scale = next((name for name in tensors if name.endswith("weight_scale_inv")), None)
        restore = (
            'restore its quantization_config, such as {"quant_method": "fp8", "weight_block_size": [128, 128]}; or '
            if scale is not None
            else ""
        )
        raise ModelError(
            f"{folder} holds {len(codes)} tensors in FP8, the first is {codes[0]}, and its config.json does not say "
            f"how they are to be read: {restore}{_float_model(folder, config)}"
        )
    for parts, named in PARTS:
        if found := sorted(name for name in tensors if parts.search(name)):
            raise ModelError(_sentence(folder, config, named, found[0]))
    integers = sorted(
        name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype not in FLOATS
    )
    if integers:
        how = f"{integers[0]} is {tensors[integers[0]].dtype}"
        raise ModelError(_sentence(folder, config, "whole numbers", how))


def fp8_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The tensor with its scales, by the name of each FP8 matrix."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype == FP8_TYPE:
            stem = name.removesuffix("weight")
            scale = next((stem + other for other in FP8_SCALES if stem + other in tensors), None)
            if scale is not None:
                found[name] = scale
    return found


def _described(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How config.json says that the weights are quantised; None if it does not."""
    for owner in (config, config.get("text_config")):
        if not isinstance(owner, Mapping):
            continue
        for key in ("quantization_config", "compression_config"):
            found = owner.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def _name(described: Mapping[str, Any]) -> str:
    method = described.get("quant_method")
    if described.get("load_in_4bit") or described.get("load_in_8bit"):
        return f"bitsandbytes {4 if described.get('load_in_4bit') else 8}-bit"
    if method is None:
        return "a format without quant_method"
    return METHODS.get(str(method), f"quant_method {str(method)!r}")


def _sentence(folder: Path, config: Mapping[str, Any], named: str, where: str) -> str:
    undo = ""
    if named.startswith(UNDONE):
        library = named.split(maxsplit=1)[0]
        undo = (
            f"; or, where {library} is installed, load it with transformers, call model.dequantize(), "
            "save_pretrained, and export that folder"
        )
    return f"{folder} is quantised already, in {named} ({where}); {_float_model(folder, config)}{undo}"


def _float_model(folder: Path, config: Mapping[str, Any]) -> str:
    base = _base_of(folder, config)
    return "export the float model it was made from" + (f", {base}" if base else "")


def _base_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Name of the model that a folder says it was made from."""
    readme = folder / "README.md"
    if readme.is_file():
        with readme.open(encoding="utf-8", errors="replace") as file:
            if (found := BASE_IN_README.search(file.read(README_BYTES))) is not None:
                return found[1]
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and name.strip() and Path(name).name != folder.name else None


def _check_fp8(
    folder: Path, config: Mapping[str, Any], described: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse FP8 that transformers' own dequantisation would not read as its config describes it."""
    if tensors and importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            f"{folder} is in FP8, which transformers loads with accelerate: pip install accelerate"
        )
    scales = fp8_scales(tensors)
    codes = sorted(name for name, tensor in tensors.items() if tensor.dtype.startswith("F8_"))
    block = described.get("weight_block_size", [128, 128])  # transformers' own default
    for name in codes:
        tensor = tensors[name]
        if tensor.dtype != FP8_TYPE or name not in scales:
            reason = f"it is {tensor.dtype}" if tensor.dtype != FP8_TYPE else "it has no scale beside it"
            raise ModelError(
                f"{folder} is in FP8, and {name} cannot be read: {reason}; {_float_model(folder, config)}"
            )
        scale = tensors[scales[name]]
        if scale.dtype not in FLOATS or not _blocks_fit(tensor.shape, scale.shape, block):
            raise ModelError(
                f"{folder} is in FP8, and {name} {list(tensor.shape)} with scales {list(scale.shape)} in {scale.dtype} "
                f"is not whole blocks of {block}, as transformers dequantises them; {_float_model(folder, config)}"
            )
    used = {*codes, *scales.values()}
    for name, tensor in sorted(tensors.items()):
        if name in used or name.endswith(ACTIVATION_SCALE):
            continue
        odd = any(parts.search(name) for parts, _ in PARTS) or (
            name.endswith(".weight") and tensor.dtype not in FLOATS
        )
        if odd:
            raise ModelError(
                f"{folder} is in FP8, and {name} ({tensor.dtype}) belongs to no FP8 matrix; "
                f"{_float_model(folder, config)}"
            )


def _blocks_fit(shape: tuple[int, ...], scale: tuple[int, ...], block: object) -> bool:
    """Whether a grid of scales divides a matrix into the blocks that are described."""
    if scale in ((), (1,), (1, 1)) and block is None:
        return True
    if not isinstance(block, list | tuple) or len(block) != len(shape) or len(scale) != len(shape):
        return False
    return all(
        isinstance(size, int) and count == -(-length // size) and (count == 1 or length % size == 0)
        for length, count, size in zip(shape, scale, block, strict=True)
    )
