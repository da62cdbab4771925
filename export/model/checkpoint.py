"""Tensors of a model folder, read one at a time from whatever weight files it has.

Safetensors and PyTorch files, whole or in shards. Files may call a tensor otherwise than the model class does (an
encoder saved with its pre-training head, a name of an older release): the names are translated by the tables that
``transformers`` itself loads by. Matrices in FP8 are multiplied by their scales by its own operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from edge_runtime.errors import ModelError
from export.model.folder import read_config
from export.model.quantised import fp8_scales, refuse_quantised
from export.model.weight_files import (
    StoredTensor,
    WeightFiles,
    equal_bytes,
    find_weights,
    gather,
    read_headers,
)

#: safetensors' names of the element types of pickled tensors.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoint:
    """The tensors of a folder under the names of a model.

    Args:
        folder: Hugging Face model folder.
        model: model whose names the tensors get; its parameters need no values.

    Raises:
        ModelError: there are no weight files, an index does not fit its shards, or the weights are quantised.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        config = read_config(folder)
        weights = find_weights(folder, config)
        self._tensors = _pickled_headers(weights) if weights.pickled else read_headers(weights)
        refuse_quantised(folder, config, self._tensors)
        self._scales = fp8_scales(self._tensors)
        self._stored: dict[str, str] = {}
        self._converted: set[str] = set()
        wanted = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        scales = set(self._scales.values())
        for stored in self._tensors:
            if stored in scales:
                continue
            name, converter = rename_source_key(
                stored, renamings, converters, model.base_model_prefix, wanted
            )
            self._stored[name] = stored
            if converter is not None:
                self._converted.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, as the model calls them; the scales of FP8 matrices are not among them."""
        return frozenset(self._stored)

    def place(self, name: str) -> tuple[Path, str]:
        """The file that holds a tensor, and its name there.

        Raises:
            ModelError: the tensor would first have to be assembled from others.
        """
        stored = self._stored[name]
        path = self._tensors[stored].file
        if name in self._converted:
            raise ModelError(
                f"{path} keeps {stored} in a layout that has to be assembled; "
                "load the model with transformers and save it again, then use that folder"
            )
        return path, stored

    def described(self, name: str) -> StoredTensor:
        """Element type and shape of a tensor, as its file has it."""
        return self._tensors[self._stored[name]]

    def is_assembled(self, name: str) -> bool:
        """Whether a tensor lies in pieces in its files."""
        return name in self._converted

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        first, second = self.described(name), self.described(other)
        if first.file.suffix == ".safetensors":
            return equal_bytes(first, second)
        return torch.equal(self.tensor(name), self.tensor(other))

    @property
    def files(self) -> frozenset[Path]:
        """All weight files."""
        return frozenset(tensor.file for tensor in self._tensors.values())

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32 (integers stay as they are), copied from its file.

        Raises:
            ModelError: the file is damaged, or the tensor would first have to be assembled from others.
        """
        path, stored = self.place(name)
        tensor = _read(path, stored)
        if stored in self._scales:
            scale = _read(self._tensors[self._scales[stored]].file, self._scales[stored])
            return _dequantised(tensor, scale)
        return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped: nothing is read until it is used, and no code of the file runs.

    Raises:
        ModelError: it is damaged, or not a file of tensors.
    """
    try:
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damaged files raise whatever their format's reader raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be read: {reason}; download the model again") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(
            f"{path} holds more than tensors; load the model with transformers and save it with save_pretrained"
        )
    return loaded


def _pickled_headers(weights: WeightFiles) -> dict[str, StoredTensor]:
    """What :func:`read_headers` gives, for PyTorch files."""

    def header(path: Path) -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(path, DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in load_pickled(path).items()
        }

    def equal(name: str, first: StoredTensor, second: StoredTensor) -> bool:
        return torch.equal(_read(first.file, name), _read(second.file, name))

    return gather(weights, {path: header(path) for path in weights.files}, equal)


def _read(path: Path, stored: str) -> Tensor:
    if path.suffix != ".safetensors":
        return load_pickled(path)[stored]
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}; download the model again") from error
    return tensor


def _dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """FP8 codes times their scales, by transformers' own operation, which gives them in the type of the scales."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: PLC0415 - loads kernels; for FP8 alone

    given = {"weight": codes, "weight_scale_inv": scale.to(torch.float32)}
    made: Tensor = Fp8Dequantize(None).convert(given)["weight"]
    return made
