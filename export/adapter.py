"""A finished run as a ``peft`` adapter: LoRA factors under peft's names, and the head beside them.

A LoRA-XS core is the LoRA pair B = up·core, A = down with scale 1 (up carries singular values and alpha / r);
a LoRA slice is the pair itself. The head has no place in peft's format of an encoder: it is written as
``head.safetensors`` (``weight`` (C, H), ``bias`` (C,)) with ``head.json``, which says how features are made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.errors import ModelError
from edge_runtime.package import Package, SliceSpec
from edge_runtime.prepared import PreparedPackage
from edge_runtime.slices import FloatArray, Values, key
from edge_runtime.weights import MappedWeights

#: Where peft puts the modules of the model it wraps.
PREFIX = "base_model.model"


def write_adapter(package: Package, values: Values, output: Path, base_model: str) -> Path:
    """Write an adapter folder, or nothing.

    Args:
        package: the package the values belong to.
        values: of every slice, by flat name.
        output: folder to create.
        base_model: name or path of the model the adapter is for, recorded in its configuration.

    Raises:
        ModelError: ``output`` exists.
    """
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    adapted = [spec for spec in package.manifest.slices if spec.kind != "head"]
    tensors: dict[str, FloatArray] = {}
    scales = set()
    for spec in adapted:
        a, b, scale = lora_pair(package, spec, values)
        tensors[f"{PREFIX}.{spec.target}.lora_A.weight"] = a
        tensors[f"{PREFIX}.{spec.target}.lora_B.weight"] = b
        scales.add((a.shape[0], scale))
    if len(scales) != 1:
        raise ModelError(f"slices of one adapter need one rank and scale, this package has {sorted(scales)}")
    rank, scale = scales.pop()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(spec.target for spec in adapted),
    }
    head = package.manifest.head
    if head is None:
        raise ModelError(f"package {package.manifest.name} has no head")
    described = {
        "labels": package.manifest.labels,
        "features": "mean of last hidden states over real tokens, divided by its root mean square",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".adapter-") as temporary:
        folder = Path(temporary) / "adapter"
        folder.mkdir()
        write_durably(folder / "adapter_model.safetensors", save(tensors))
        write_durably(folder / "adapter_config.json", json.dumps(config, indent=2).encode())
        parts = {part.name: values[key(head.name, part.name)] for part in head.tensors}
        write_durably(folder / "head.safetensors", save(parts))
        write_durably(folder / "head.json", json.dumps(described, indent=2).encode())
        shutil.copyfile(package.path(package.manifest.tokenizer), folder / "tokenizer.json")
        rename_durably(folder, output)
    return output


def lora_pair(package: Package, spec: SliceSpec, values: Values) -> tuple[FloatArray, FloatArray, float]:
    """LoRA's A (r, in), B (out, r) and scale for a slice."""
    weights = MappedWeights(PreparedPackage.as_stored(package), spec.segment).arrays
    stem = spec.tensors[0].input.rsplit("_", 1)[0]
    if spec.kind == "lora":
        return (
            values[key(spec.name, "A")][0],
            values[key(spec.name, "B")][0],
            float(weights[f"{stem}_scale"]),
        )
    up = np.asarray(weights[f"{stem}_up"], dtype=np.float32)
    down = np.array(weights[f"{stem}_down"], dtype=np.float32)
    return down, up @ values[key(spec.name, "core")][0], 1.0
