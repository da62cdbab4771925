"""A finished run as a ``peft`` adapter: LoRA factors under peft's names, and the head beside them.

How values of a kind of slices become a LoRA pair is in its module of :mod:`export.slices`. (peft 0.21 has no LoRA-XS of
its own.) An adapter of a causal language model loads on
``AutoModelForCausalLM``. One for classification loads on ``AutoModelForSequenceClassification`` if training went on
from the folder's own classifier, whose last layer is written as peft writes ``modules_to_save``. Any other head has no
place in peft's format: the adapter loads on ``AutoModel``, and beside it are ``head.safetensors`` (``weight`` (C, H),
``bias`` (C,)), ``head.json``, which says how features are made, and of which blocks if a run named some, and
``load_classifier.py``, which loads all of it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from msgspec import UNSET
from safetensors.numpy import save
from torch import Tensor

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.errors import ModelError
from edge_runtime.execution.weights import MappedWeights
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.ranks import factor_of
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
    in_classifier,
    names_of_classifier,
)
from export.quantisation.quantise import dequantise
from export.slices.kinds import KINDS
from export.slices.sliced_linear import Frozen, Pair

LOADER = "load_classifier.py"
#: What names of a program's inputs begin with that are frozen parts of the folder's own classifier.
OWN_STEM = "own_model_"
#: Names that peft gives ``modules_to_save`` by itself for sequence classification.
SAVED = ("classifier", "score")


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
    tensors = _own_classifier(package, values)
    before = in_classifier(package.manifest.base.architecture) if tensors else ""
    scales = set()
    for spec in adapted(package):
        a, b, scale = lora_pair(package, spec, values)
        tensors[f"{ROOT}.{before}{spec.target}.{A_SUFFIX}"] = a
        tensors[f"{ROOT}.{before}{spec.target}.{B_SUFFIX}"] = b
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
    """Write a fresh head, its description and what loads it into a folder; nothing for any other head or none."""
    head, features = package.manifest.head, package.manifest.head_features
    if head is None or features == "own":
        return
    described: dict[str, object] = {
        "labels": package.manifest.labels,
        "features": FEATURES[features],
        "pooling": features,
    }
    if package.manifest.head_blocks:
        described["features"] = f"behind each of the blocks, side by side: {FEATURES[features]}"
        described["blocks"] = package.manifest.head_blocks
        described["layers"] = len(package.manifest.segments) - 2
    parts = {part.name: values[key(head.name, part.name)] for part in head.tensors}
    write_durably(folder / HEAD_TENSORS, save(parts))
    write_durably(folder / HEAD_DESCRIBED, json.dumps(described, indent=2).encode())
    shutil.copyfile(Path(__file__).with_name(LOADER), folder / LOADER)


def own_head_values(package: Package, values: Values, labels: tuple[str, ...]) -> dict[str, FloatArray]:
    """Values of a head that went on from the folder's own classifier, its rows in the order of ``labels``.

    Returns:
        ``weight`` and, if it has one, ``bias``; empty for any other head.
    """
    head = package.manifest.head
    if head is None or package.manifest.head_features != "own":
        return {}
    rows = [package.manifest.labels.index(label) for label in labels]
    return {part.name: values[key(head.name, part.name)][rows] for part in head.tensors}


def _own_classifier(package: Package, values: Values) -> dict[str, FloatArray]:
    """The classifier's last layer as peft names it, rows as the model that it is loaded on orders its classes."""
    labels, head = package.manifest.own_labels, package.manifest.head
    if labels is UNSET or head is None:
        return {}
    tensors = classifier_tensors(package, values, labels)
    return {f"{ROOT}.{name}": part for name, part in tensors.items()}


def classifier_tensors(package: Package, values: Values, labels: tuple[str, ...]) -> dict[str, FloatArray]:
    """A classifier that was gone on from, under the names of its class: the last layer, and what peft saves with it.

    Args:
        package: package the values belong to.
        values: values of every slice, by flat name.
        labels: labels in the order that the rows get.

    Returns:
        Values by name; empty for a fresh head.
    """
    head = package.manifest.head
    if head is None:
        return {}
    parts = own_head_values(package, values, labels)
    written = {f"{head.target}.{name}": part for name, part in parts.items()}
    return {**written, **_saved_beside(package, head)} if written else {}


def _saved_beside(package: Package, head: SliceSpec) -> dict[str, FloatArray]:
    """Frozen tensors that peft asks for beside the last layer, such as RoBERTa's ``classifier.dense``.

    It saves as a whole, and looks for, each module whose name ends as one of :func:`_saved_modules` does.
    """
    arrays = MappedWeights(PreparedPackage.as_stored(package), head.segment).arrays
    frozen = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items() if name.startswith(OWN_STEM)}
    if not frozen:
        return {}
    inputs = {re.sub("_(levels|scales|zero_points)$", "", name) for name in frozen}
    return {
        name: whole_factor(frozen, f"{OWN_STEM}{name.replace('.', '_')}", "_").numpy()
        for name in names_of_classifier(package.manifest.base.architecture)
        if name.split(".")[0].endswith(_saved_modules(head))
        and f"{OWN_STEM}{name.replace('.', '_')}" in inputs
    }


def _saved_modules(head: SliceSpec) -> tuple[str, ...]:
    """The names that peft gives by itself, and the module of the last layer if it has none of them (BART's has not)."""
    module = head.target.split(".", maxsplit=1)[0]
    return SAVED if module.endswith(SAVED) else (*SAVED, module)


def _describe(package: Package, rank: int, scale: float, base_model: str) -> dict[str, object]:
    manifest, head = package.manifest, package.manifest.head
    own = head is not None and manifest.head_features == "own"
    task_type = "SEQ_CLS" if own else "CAUSAL_LM" if manifest.task == "causal_lm" else None
    saved = {"modules_to_save": list(_saved_modules(head))} if own and head is not None else {}
    return {
        **saved,
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": manifest.base.architecture in CONV1D_FAMILIES,
        "inference_mode": True,
        "target_modules": sorted(spec.target for spec in adapted(package)),
    }


def lora_pair(package: Package, spec: SliceSpec, values: Values) -> Pair:
    """LoRA's A (r, in), B (out, r) and scale for a slice; :class:`ModelError` for a kind without."""
    return KINDS[spec.kind].pair(spec.name, own_values(spec, values), frozen_of(package, spec))


def own_values(spec: SliceSpec, values: Values) -> dict[str, FloatArray]:
    """A slice's values, by name within the slice."""
    return {tensor.name: values[key(spec.name, tensor.name)] for tensor in spec.tensors}


def frozen_of(package: Package, spec: SliceSpec) -> Frozen:
    """What gives a slice's frozen tensors, from the package's files."""
    arrays = MappedWeights(PreparedPackage.as_stored(package), spec.segment).arrays
    weights = {
        name: torch.from_numpy(np.array(a)) for name, a in arrays.items() if name.startswith(stem(spec))
    }
    factor = np.float32(factor_of(spec))

    def frozen(name: str) -> FloatArray:
        found: FloatArray = whole_factor(weights, f"{stem(spec)}_{name}", "_").numpy()
        return found * factor if name == "scale" else found

    return frozen


def stem(spec: SliceSpec) -> str:
    """What the names of a slice's inputs and frozen tensors begin with."""
    return spec.tensors[0].input.rsplit("_", 1)[0]


def whole_factor(tensors: Mapping[str, Tensor], name: str, joint: str) -> Tensor:
    """A frozen tensor as programs compute with it: as stored, or put together from its quantised parts.

    Args:
        tensors: tensors by name, among them the wanted one or its parts.
        name: name of the tensor.
        joint: character between the name of the tensor and that of a part.

    Raises:
        ModelError: neither the tensor nor its parts are there.
    """
    if name in tensors:
        return tensors[name]
    parts = [tensors.get(f"{name}{joint}{part}") for part in ("levels", "scales", "zero_points")]
    levels, scales, zero_points = parts
    if levels is None or scales is None:
        raise ModelError(f"the package has no tensor {name}; export it again")
    return dequantise(levels, scales, zero_points)
