"""A finished run merged into the float model folder it came from: every adapted weight becomes W + what its slice adds.

Weight files are copied as they are and the adapted tensors rewritten in place: names, sharding, dtypes, tied tensors
and metadata stay, and memory holds one tensor at a time. Everything else in the folder is copied too, except weights in
other formats, which would still be unmerged.

A head that went on from the folder's own classifier goes back into it, with the labels of the package. A fresh head
goes beside the weights, with what loads it; a classifier of the folder's own would predict otherwise and is taken out.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edge_runtime.durable import rename_durably
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import Manifest, SliceSpec
from edge_runtime.package.package import Package
from edge_runtime.package.slices import Values
from export.adapters.peft_names import CONFIG, HEAD_DESCRIBED, HEAD_TENSORS, WEIGHTS
from export.adapters.saved_head import write_with_classifier
from export.adapters.take_out import take_out
from export.adapters.write import (
    LOADER,
    adapted,
    classifier_tensors,
    frozen_of,
    own_head_values,
    own_values,
    write_head,
)
from export.model.features import classifier_class
from export.model.folder import CONFIG as MODEL_CONFIG
from export.model.folder import read_config, require_finite
from export.model.load import LoadedModel, Place, load_model
from export.model.own_head import UnusableHead
from export.slices.kinds import KINDS
from export.slices.sliced_linear import SliceOptions

#: safetensors' names of the dtypes that a merge can add to.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Files that hold weights, or a training's state; beside the model's own they would be stale.
WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data")
)
STALE_FOLDERS = frozenset({"onnx", "openvino", "coreml", ".git", ".cache"})
LEFTOVERS = frozenset({CONFIG, WEIGHTS, HEAD_TENSORS, HEAD_DESCRIBED, LOADER})


@dataclass(frozen=True)
class Merged:
    """A merged model folder.

    Attributes:
        folder: folder that was written.
        changed: names of the weight files in it that hold merged weights.
        left_out: files of the model folder that were not copied.
        taken_out: tensors of a classifier that the weight files no longer hold, because it was not trained.
    """

    folder: Path
    changed: tuple[str, ...]
    left_out: tuple[str, ...]
    taken_out: tuple[str, ...]


def merge(package: Package, values: Values, model_folder: Path, output: Path) -> Merged:
    """Write a model folder with the slices merged in, or nothing.

    Args:
        package: package the values belong to.
        values: values of every slice, by flat name.
        model_folder: folder of the float model the package was made from; its weights must be safetensors.
        output: folder to create.

    Raises:
        ModelError: ``output`` exists or lies in the model folder, the folder is of another model than the package, or
            a weight cannot be added to.
    """
    if output.exists():
        raise ModelError(f"{output} exists already; choose another --output or remove it")
    if output.resolve().is_relative_to(model_folder.resolve()):
        raise ModelError(f"{output} lies in the model folder; choose another --output")
    with ExitStack() as kept:
        return _merge(package, values, model_folder, output, kept)


def _merge(package: Package, values: Values, model_folder: Path, output: Path, kept: ExitStack) -> Merged:
    """Write a merged folder; folders in ``kept`` are there until it is written."""
    try:
        model = _load(package, model_folder)
    except UnusableHead as lacking:
        model_folder = _with_classifier(package, values, model_folder, lacking, kept)
        model = _load(package, model_folder)
    places = {spec.name: model.place(f"encoder.{spec.target}.linear.weight") for spec in adapted(package)}
    own = {
        name: (model.classifier_place(name), value)
        for name, value in own_head_values(package, values, package.manifest.labels).items()
    }
    stale = () if own or package.manifest.head is None else model.own_classifier()
    for place in (*places.values(), *(place for place, _ in own.values()), *stale):
        if place.file.suffix != ".safetensors":
            raise ModelError(
                f"{place.file} is no safetensors file; load the model with transformers, save it with "
                "save_pretrained, and merge into that folder"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merge-") as temporary:
        folder = Path(temporary) / "model"
        left_out = _copy(model_folder, folder, {path.name for path in model.weight_files})
        for spec in adapted(package):
            place = places[spec.name]
            _add(folder / place.file.name, place, _change(package, spec, values, model))
        for place, value in own.values():
            _replace(folder / place.file.name, place, torch.from_numpy(value))
        taken_out = tuple(sorted(place.stored for place in stale))
        for name in sorted({place.file.name for place in stale}):
            take_out(folder, name, frozenset(taken_out))
        _write_config(folder, package.manifest, model, has_classifier=classifier_class(read_config(folder)))
        write_head(package, values, folder)
        rename_durably(folder, output)
    changed = {place.file.name for place in (*places.values(), *(place for place, _ in own.values()), *stale)}
    return Merged(output, tuple(sorted(changed)), left_out, taken_out)


def _load(package: Package, folder: Path) -> LoadedModel:
    """The folder's model, without its weights. It must be the one that the package was made from.

    Raises:
        UnusableHead: it lacks the classifier that the package went on from.
        ModelError: it is another model.
    """
    manifest = package.manifest
    targets = tuple(spec.target for spec in adapted(package))
    options = SliceOptions(kind="lora", rank=1, alpha=1.0, targets=targets)
    features = manifest.head_features if manifest.head is not None else None
    if manifest.head_blocks:
        features = None  # such a head is none of the module's
    model = load_model(folder, max(2, len(manifest.labels)), options, manifest.task, features=features)
    found = (model.architecture, model.parameters)
    expected = (manifest.base.architecture, manifest.base.parameters)
    if found != expected:
        raise ModelError(
            f"{folder} is {found[0]} with {found[1]} parameters, the package was made from {expected[0]} with "
            f"{expected[1]}; name the folder it was exported from"
        )
    return model


def _with_classifier(
    package: Package, values: Values, folder: Path, lacking: UnusableHead, kept: ExitStack
) -> Path:
    """The folder with the package's classifier: one that came with an adapter is not in the model's folder.

    Raises:
        ModelError: the folder has one otherwise, and is not the one the package was made from.
    """
    tensors = classifier_tensors(package, values, package.manifest.labels)
    made = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="merge-")))
    try:
        return write_with_classifier(folder, tensors, package.manifest.labels, made / folder.name)
    except UnusableHead as error:
        raise ModelError(
            f"{folder} has not the classifier that the package went on from: {lacking}; name the folder it was "
            "exported from"
        ) from error


def _copy(source: Path, target: Path, weights: set[str]) -> tuple[str, ...]:
    """Copy a folder's files, following links; returns those that were left out."""
    left_out = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if not path.is_file():
            continue
        top = len(relative.parts) == 1
        stale = top and path.name not in weights and path.suffix in WEIGHT_SUFFIXES
        if stale or (top and path.name in LEFTOVERS) or relative.parts[0] in STALE_FOLDERS:
            left_out.append(str(relative))
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
    return tuple(left_out)


def _write_config(folder: Path, manifest: Manifest, model: LoadedModel, has_classifier: str | None) -> None:
    """State the package's labels where the folder's class has a classifier, and the class that the weights now are."""
    if manifest.head is None or has_classifier is None:
        return
    config = read_config(folder)
    config["id2label"] = {str(index): label for index, label in enumerate(manifest.labels)}
    config["label2id"] = {label: index for index, label in enumerate(manifest.labels)}
    config.pop("num_labels", None)
    if manifest.head_features != "own":
        config["architectures"] = [type(model.module.encoder).__name__]
    (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _add(path: Path, place: Place, change: Tensor) -> None:
    """Add a change (out, in) to one tensor of a safetensors file, in place."""
    update = change.T if place.transposed else change
    _rewrite(path, place, update, lambda weight: weight + update)


def _replace(path: Path, place: Place, value: Tensor) -> None:
    """Put other values in the place of one tensor of a safetensors file."""
    _rewrite(path, place, value, lambda _: value)


def _rewrite(path: Path, place: Place, given: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of a safetensors file in place, computing in float32 at least."""
    dtype, whole_shape, start, end = _span(path, place.stored)
    index, count = place.part
    shape = torch.Size((whole_shape[0] // count, *whole_shape[1:]))
    if dtype not in DTYPES:
        raise ModelError(
            f"{path.name} holds {place.stored} as {dtype}; a merge needs a model in {', '.join(DTYPES)}"
        )
    if given.shape != shape:
        raise ModelError(
            f"{path.name} holds {place.stored} as {tuple(shape)}, the package's slice adds {tuple(given.shape)}; "
            "name the folder it was exported from"
        )
    with path.open("r+b") as file:
        file.seek(start)
        whole = torch.frombuffer(bytearray(file.read(end - start)), dtype=DTYPES[dtype]).reshape(whole_shape)
        weight = whole.chunk(count)[index]
        merged = change(weight.to(torch.promote_types(weight.dtype, torch.float32))).to(weight.dtype)
        require_finite(place.stored, merged)
        weight.copy_(merged)
        file.seek(start)
        file.write(whole.flatten().view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _change(package: Package, spec: SliceSpec, values: Values, model: LoadedModel) -> Tensor:
    """What a slice adds to its layer's weight (out, in)."""
    out, inputs = model.module.get_parameter(f"encoder.{spec.target}.linear.weight").shape
    kind = KINDS[spec.kind]
    return kind.change(spec.name, own_values(spec, values), frozen_of(package, spec), (out, inputs))


def _span(path: Path, name: str) -> tuple[str, torch.Size, int, int]:
    """dtype, shape, and first and past-the-last byte of a tensor.

    A safetensors file is eight bytes with the length of a JSON header, the header, and the data that its offsets
    count from (safetensors' README, "Format"). The file was opened by the library before, which checks all that.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    first, last = entry["data_offsets"]
    return entry["dtype"], torch.Size(entry["shape"]), 8 + length + first, 8 + length + last
