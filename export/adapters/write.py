"""A finished run as a ``peft`` adapter: LoRA factors under peft's names, and the head beside them.

A LoRA-XS core is the LoRA pair B = up·core, A = down with scale 1 (up carries singular values and alpha / r);
a LoRA slice is the pair itself. (peft 0.21 has no LoRA-XS of its own.) An adapter of a causal language model loads on
``AutoModelForCausalLM``, one for classification on ``AutoModel``. The head of the latter has no place in peft's format:
it is written as ``head.safetensors`` (``weight`` (C, H), ``bias`` (C,)) with ``head.json``, which says how features
are made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.errors import ModelError
from edge_runtime.execution.weights import MappedWeights
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import FloatArray, Values, key
from export.adapters.peft_names import (
    A_SUFFIX,
    B_SUFFIX,
    CONFIG,
    CONV1D_FAMILIES,
    FEATURES,
    HEAD_DESCRIBED,
    HEAD_TENSORS,
    ROOT,
    WEIGHTS,
)
from export.quantisation.quantise import dequantise


def write_adapter(package: Package, values: Values, output: Path, base_model: str) -> Path:
    """Write an adapter folder, or nothing.

    Args:
        package: package the values belong to.
        values: values of every slice, by flat name.
        output: folder to create.
        base_model: name or path of the model the adapter is for, recorded in its configuration.

    Raises:
        ModelError: ``output`` exists, or the slices do not have one rank and scale.
    """
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    tensors: dict[str, FloatArray] = {}
    scales = set()
    for spec in adapted(package):
        a, b, scale = lora_pair(package, spec, values)
        tensors[f"{ROOT}.{spec.target}.{A_SUFFIX}"] = a
        tensors[f"{ROOT}.{spec.target}.{B_SUFFIX}"] = b
        scales.add((a.shape[0], scale))
    if len(scales) != 1:
        raise ModelError(f"slices of one adapter need one rank and scale, this package has {sorted(scales)}")
    rank, scale = scales.pop()
    config = _describe(package, rank, scale, base_model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".adapter-") as temporary:
        folder = Path(temporary) / "adapter"
        folder.mkdir()
        write_durably(folder / WEIGHTS, save(tensors))
        write_durably(folder / CONFIG, json.dumps(config, indent=2).encode())
        write_head(package, values, folder)
        shutil.copyfile(package.path(package.manifest.tokenizer), folder / "tokenizer.json")
        rename_durably(folder, output)
    return output


def adapted(package: Package) -> tuple[SliceSpec, ...]:
    """The slices that adapt a layer: all but the head."""
    return tuple(spec for spec in package.manifest.slices if spec.kind != "head")


def write_head(package: Package, values: Values, folder: Path) -> None:
    """Write the head and its description into a folder, or nothing if the package has no head."""
    head = package.manifest.head
    if head is None:
        return
    described = {
        "labels": package.manifest.labels,
        "features": FEATURES[package.manifest.head_features],
    }
    parts = {part.name: values[key(head.name, part.name)] for part in head.tensors}
    write_durably(folder / HEAD_TENSORS, save(parts))
    write_durably(folder / HEAD_DESCRIBED, json.dumps(described, indent=2).encode())


def _describe(package: Package, rank: int, scale: float, base_model: str) -> dict[str, object]:
    manifest = package.manifest
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if manifest.task == "causal_lm" else None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": manifest.base.architecture in CONV1D_FAMILIES,
        "inference_mode": True,
        "target_modules": sorted(spec.target for spec in adapted(package)),
    }


def lora_pair(package: Package, spec: SliceSpec, values: Values) -> tuple[FloatArray, FloatArray, float]:
    """LoRA's A (r, in), B (out, r) and scale for a slice."""
    arrays = MappedWeights(PreparedPackage.as_stored(package), spec.segment).arrays
    weights = {
        name: torch.from_numpy(np.array(a)) for name, a in arrays.items() if name.startswith(stem(spec))
    }
    if spec.kind == "lora":
        scale = float(weights[f"{stem(spec)}_scale"])
        return values[key(spec.name, "A")][0], values[key(spec.name, "B")][0], scale
    up = whole_factor(weights, f"{stem(spec)}_up", "_").numpy()
    down = whole_factor(weights, f"{stem(spec)}_down", "_").numpy()
    return down, up @ values[key(spec.name, "core")][0], 1.0


def stem(spec: SliceSpec) -> str:
    """What the names of a slice's inputs and frozen tensors begin with."""
    return spec.tensors[0].input.rsplit("_", 1)[0]


def whole_factor(tensors: Mapping[str, Tensor], name: str, joint: str) -> Tensor:
    """A LoRA-XS factor as programs compute with it: as stored, or put together from its quantised parts.

    Args:
        tensors: tensors by name, among them the factor or its parts.
        name: name of the factor.
        joint: character between the name of the factor and that of a part.

    Raises:
        ModelError: neither the factor nor its parts are there.
    """
    if name in tensors:
        return tensors[name]
    parts = [tensors.get(f"{name}{joint}{part}") for part in ("levels", "scales", "zero_points")]
    levels, scales, zero_points = parts
    if levels is None or scales is None:
        raise ModelError(f"the package has no tensor {name}; export it again")
    return dequantise(levels, scales, zero_points)
