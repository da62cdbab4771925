"""Tensors of a model folder, read one at a time from whatever weight files it has.

Safetensors and PyTorch files, whole or in shards. Files may call a tensor otherwise than the model class does (an
encoder saved with its pre-training head, a name of an older release): the names are translated by the tables that
``transformers`` itself loads by.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from edge_runtime.errors import ModelError

#: Weight files that transformers writes, in the order it looks for them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_INDEX_BYTES = 64 << 20


class Checkpoint:
    """The tensors of a folder under the names of a model.

    Args:
        folder: a Hugging Face model folder.
        model: whose names to use; its parameters need no values.

    Raises:
        ModelError: there are no weight files, or an index names shards that are missing.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._folder = folder
        self._places: dict[str, tuple[Path, str]] = {}
        wanted = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converted: set[str] = set()
        for stored, path in weight_files(folder).items():
            name, converter = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, wanted
            )
            self._places[name] = (path, stored)
            if converter is not None:
                self._converted.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def place(self, name: str) -> tuple[Path, str]:
        """The file that holds a tensor, and its name there.

        Raises:
            ModelError: the tensor would first have to be assembled from others.
        """
        path, stored = self._places[name]
        if name in self._converted:
            raise ModelError(
                f"{path} keeps {stored} in a layout that has to be assembled; "
                "load the model with transformers and save it again, then use that folder"
            )
        return path, stored

    @property
    def files(self) -> frozenset[Path]:
        """All weight files."""
        return frozenset(path for path, _ in self._places.values())

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32 (integers stay as they are), copied from its file.

        Raises:
            ModelError: the file is damaged, or the tensor would first have to be assembled from others.
        """
        tensor = _read(*self.place(name))
        return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name, as stored, to the file that holds it.

    Raises:
        ModelError: there are no weight files, one is damaged, or an index names shards that are missing.
    """
    for file in WEIGHT_FILES:
        if (folder / f"{file}.index.json").is_file():
            return _sharded(folder, folder / f"{file}.index.json")
        if (folder / file).is_file():
            return dict.fromkeys(_names(folder / file), folder / file)
    raise ModelError(f"{folder} has no weights: looked for {', '.join(WEIGHT_FILES)} and their .index.json")


def _sharded(folder: Path, index: Path) -> dict[str, Path]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ModelError(f"{index} has more than {MAX_INDEX_BYTES} bytes; it should only list tensors")
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        places = {str(name): folder / str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weight files: {error!r}") from error
    outside = sorted({path.name for path in places.values() if path.parent != folder})
    if outside:
        raise ModelError(f"{index} names {outside[0]}, which is not in the folder")
    missing = sorted({path.name for path in places.values() if not path.is_file()})
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its weight files, the first is {missing[0]}; download the model again"
        )
    return places


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return list(file.keys())
    return list(_load_pickled(path))


def _read(path: Path, stored: str) -> Tensor:
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            try:
                tensor: Tensor = file.get_tensor(stored)
            except SafetensorError as error:
                raise ModelError(f"{path} cannot be read: {error}; download the model again") from error
            return tensor
    return _load_pickled(path)[stored]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}; download the model again") from error


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped: nothing is read until it is used."""
    try:
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damaged files raise whatever their format's reader raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be read: {reason}; download the model again") from error
    return loaded
