"""The classifier that peft saved with an adapter, and a folder that has it: what a package's head goes on from.

peft trains a classifier as a whole beside the pairs (``modules_to_save``, which it adds by itself for SEQ_CLS). Put
into the model's folder it is a classifier of the folder's own, and is taken or named like one
(:mod:`export.model.own_head`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edge_runtime.package.slices import FloatArray
from export.adapters.read import SavedHead
from export.adapters.settings import MERGE_FIRST
from export.adapters.take_out import take_out
from export.model.folder import CONFIG, read_config
from export.model.label_map import read_id2label
from export.model.own_head import UnusableHead
from export.model.weight_files import (
    EXPLICIT,
    INDEX_SUFFIX,
    WEIGHT_SUFFIXES,
    WEIGHTS,
    StoredTensor,
    find_weights,
    read_headers,
)

#: Tasks that adapters of classifiers state; some state none.
TASKS = frozenset(("SEQ_CLS", None))
HEAD_FILE = "classifier.safetensors"


def order_of_classes(folder: Path, labels: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Labels by class of an adapter that was trained on a folder's model, and what to tell of it.

    An adapter does not state its labels: they are the folder's where those are the package's, else they come in the
    order in which they are given.
    """
    theirs = read_id2label(read_config(folder), folder / CONFIG)
    if set(theirs) == set(labels):
        return theirs, "" if theirs == labels else "; its rows are put in the order of --labels"
    return labels, "; its classes have no names, and are taken in the order of --labels"


def folder_with_head(folder: Path, head: SavedHead, labels: tuple[str, ...], into: Path) -> Path:
    """Make a folder of a model with an adapter's classifier in the place of its own, or beside its layers.

    Args:
        folder: model folder.
        head: classifier of the adapter.
        labels: labels by class.
        into: folder to create.

    Raises:
        UnusableHead: a package cannot go on from the classifier; the reason completes "is not used: …".
        ModelError: the folder's weights cannot be read.
    """
    if head.task_type not in TASKS:
        raise UnusableHead(f"it was trained for {str(head.task_type)[:40]}, not for one label a text")
    if head.pairs:
        raise UnusableHead(
            f"{next(iter(head.pairs))} has a pair of its own, and a head is trained as a whole"
        )
    last = [name for name, value in head.tensors.items() if value.ndim == 2 and len(value) == len(labels)]
    if not last:
        raise UnusableHead(f"it has no layer with {len(labels)} rows, one for each label")
    weights = find_weights(folder, read_config(folder))
    if weights.pickled:
        raise UnusableHead(f"{weights.files[0].name} is no safetensors file, beside which it could be put")
    module = last[-1].rpartition(".")[0]
    stored = read_headers(weights)
    for name, value in head.tensors.items():
        if name.rpartition(".")[0] != module and name in stored and not _is_same(stored[name], name, value):
            raise UnusableHead(
                f"it changes {name}, which the folder has too, beside its last layer: {MERGE_FIRST}"
            )
    return write_with_classifier(folder, head.tensors, labels, into)


def write_with_classifier(
    folder: Path, tensors: Mapping[str, FloatArray], labels: tuple[str, ...], into: Path
) -> Path:
    """Make a folder of a model with other values of a classifier: its files linked, its weights listed anew.

    Args:
        folder: model folder with safetensors files.
        tensors: values of the classifier under their names in the class with a head.
        labels: labels by class.
        into: folder to create.

    Raises:
        UnusableHead: transformers has no class with a classifier for the model.
        ModelError: the folder's weights cannot be read.
    """
    config = read_config(folder)
    weights = find_weights(folder, config)
    into.mkdir(parents=True)
    for path in folder.iterdir():
        if (
            path.suffix not in WEIGHT_SUFFIXES
            and not path.name.endswith(INDEX_SUFFIX)
            and path.name != CONFIG
        ):
            (into / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
    places: dict[str, str] = {}
    for number, file in enumerate(weights.files):
        found = {name: each for name, each in read_headers(weights).items() if each.file == file}
        name = f"model-{number}.safetensors"
        (into / name).symlink_to(file.resolve())
        if replaced := frozenset(found) & frozenset(tensors):
            take_out(into, name, replaced)
        places |= dict.fromkeys(frozenset(found) - replaced, name)
    save_file({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, into / HEAD_FILE)
    places |= dict.fromkeys(tensors, HEAD_FILE)
    index = {"metadata": {}, "weight_map": places}
    (into / f"{WEIGHTS[0]}{INDEX_SUFFIX}").write_text(json.dumps(index), "utf-8")
    changed = {
        **{
            key: value for key, value in config.items() if key not in ("num_labels", "problem_type", EXPLICIT)
        },
        "architectures": [_class_with_classifier(str(config.get("model_type")))],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    (into / CONFIG).write_text(json.dumps(changed), "utf-8")
    return into


def _class_with_classifier(architecture: str) -> str:
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415 - slow to import
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    named = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(architecture)
    if named is None:
        raise UnusableHead(f"transformers has no class with a classifier for {architecture}")
    return str(named)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:  # opened whole before, for its header
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _is_same(stored: StoredTensor, name: str, value: FloatArray) -> bool:
    """Whether a folder holds the same values, as far as its type tells."""
    own = _read(stored.file, name)
    return own.shape == value.shape and own.equal(torch.from_numpy(value).to(own.dtype))
