"""Tensors of a model folder, read one at a time from whatever weight files it has.

Safetensors and PyTorch files, whole or in shards. Files may call a tensor otherwise than the model class does (an
encoder saved with its pre-training head, a name of an older release): the names are translated by the tables that
``transformers`` itself loads by.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from edge_runtime.errors import ModelError
from export.model.folder import load_pickled, weight_files


class Checkpoint:
    """The tensors of a folder under the names of a model.

    Args:
        folder: Hugging Face model folder.
        model: model whose names the tensors get; its parameters need no values.

    Raises:
        ModelError: there are no weight files, or an index names shards that are missing.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        wanted = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converted: set[str] = set()
        for file, names in weight_files(folder).items():
            for stored in names:
                name, converter = rename_source_key(
                    stored, renamings, converters, model.base_model_prefix, wanted
                )
                self._places[name] = (folder / file, stored)
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


def _read(path: Path, stored: str) -> Tensor:
    if path.suffix != ".safetensors":
        return load_pickled(path)[stored]
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}; download the model again") from error
    return tensor
