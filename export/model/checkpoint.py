"""Tensors of a model folder, read one at a time from whatever weight files it has.

Safetensors and PyTorch files, whole or in shards. Files may call a tensor otherwise than the model class does (an
encoder saved with its pre-training head, a name of an older release): the names are translated by the tables that
``transformers`` itself loads by. Matrices in FP8 are multiplied by their scales by its own operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

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
        self._parts: dict[str, tuple[int, int]] = {}
        wanted = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        scales = set(self._scales.values())
        for stored in self._tensors:
            if stored in scales:
                continue
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
            if pattern is None:
                self._stored[name] = stored
            else:
                self._take_apart(
                    stored, name, next(each for each in converters if pattern in each.source_patterns)
                )

    def _take_apart(self, stored: str, name: str, converter: WeightConverter) -> None:
        """Note a tensor that is not stored as the model has it; the library calls it by the first of its parts."""
        first, *_ = targets = converter.target_patterns
        names = [name.replace(first, target, 1) for target in targets]
        self._stored |= dict.fromkeys(names, stored)
        if _is_even_split(converter):
            self._parts |= {part: (index, len(names)) for index, part in enumerate(names)}
        else:
            self._converted |= set(names)

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
                f"{path} keeps {stored} in a layout that has to be assembled; load the model with transformers, save "
                "it with save_pretrained(folder, save_original_format=False), and use that folder"
            )
        return path, stored

    def part(self, name: str) -> tuple[int, int]:
        """Which part of its stored tensor a tensor is, and of how many of equal rows; 0 of 1 if it is the whole."""
        return self._parts.get(name, (0, 1))

    def described(self, name: str) -> StoredTensor:
        """Element type, shape and bytes of a tensor, as its file has it."""
        whole, (index, count) = self._tensors[self._stored[name]], self.part(name)
        if count == 1 or not whole.shape or whole.shape[0] % count:
            return whole
        shape, size = (whole.shape[0] // count, *whole.shape[1:]), (whole.end - whole.start) // count
        start = whole.start + index * size
        return replace(whole, shape=shape, start=start, end=start + size)

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
        index, count = self.part(name)
        tensor = _read(path, stored)
        if stored in self._scales:
            scale = _read(self._tensors[self._scales[stored]].file, self._scales[stored])
            return _dequantised(tensor, scale).chunk(count)[index].clone()
        tensor = tensor.chunk(count)[index] if count > 1 else tensor
        return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


def _is_even_split(converter: WeightConverter) -> bool:
    """Whether one stored tensor holds several of a model, one after the other and with equally many rows each."""
    operations = converter.operations
    return (
        len(converter.source_patterns) == 1
        and len(operations) == 1
        and isinstance(operations[0], Chunk)
        and operations[0].dim == 0
        and operations[0].num_shards_attribute is None
    )


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
