"""A model as a package stores it: its segments, and the tensors they name, made one at a time.

*Stored* means quantised, as the package's files hold it: frozen matrices in int8 or int4 (float32 where quantisation is
``none``), all else as it is. A tensor is read from the model's folder and quantised when it is asked for, or read back
from the package that is being written. Nobody holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_runtime.package.manifest import TensorRef
from export.capture.record import capture
from export.capture.segment import SegmentGraph
from export.model.generation import CacheShape
from export.model.load import LoadedModel
from export.quantisation.quantise import quantise
from export.quantisation.quantise_graph import StoredPart, quantise_segment


@dataclass(frozen=True)
class StoredModel:
    """A captured model whose segments compute with quantised matrices.

    Attributes:
        segments: segments, in order, on quantised operators.
        plain: same segments before their matrices were quantised.
        shapes: shape and dtype of every tensor that ``segments`` name, on the meta device.
        tensors: values of these tensors; those that only ``plain`` names can be asked for too.
        decoding: the same segments as they give the next token from cached keys and values; empty where that was not
            asked for.
        cache_shape: what each block of these keeps of a token; None without them.
    """

    segments: tuple[SegmentGraph, ...]
    plain: tuple[SegmentGraph, ...]
    shapes: dict[str, Tensor]
    tensors: StoredTensors
    decoding: tuple[SegmentGraph, ...] = ()
    cache_shape: CacheShape | None = None

    def in_memory(self) -> dict[str, Tensor]:
        """All values at once, for small models that are run many times."""
        return {name: self.tensors[name] for name in self.tensors}


def store(model: LoadedModel, quantisation: str, *, with_generation: bool = False) -> StoredModel:
    """Capture a model, cut it, and quantise its frozen matrices.

    Args:
        model: model to capture, loaded for this alone: its module has no usable values afterwards.
        quantisation: format of frozen matrices: ``int8``, ``int4``, or ``none`` for float32.
        with_generation: whether to capture it as it gives the next token, too.

    Raises:
        ModelError: the model cannot be recorded, or its blocks are not a chain.
    """
    captured = capture(model, with_generation=with_generation)
    plain = tuple(segment.copied() for segment in captured.segments)
    parts: dict[str, StoredPart] = {}
    for segment in (*captured.segments, *captured.decoding):
        parts.update(quantise_segment(segment, captured.tensors, quantisation)[1])
    shapes = dict(captured.tensors)
    for name, part in parts.items():
        shapes[name] = torch.empty(part.shape, dtype=part.dtype, device="meta")
    named = {
        source
        for segment in (*captured.segments, *captured.decoding)
        for source in (*segment.weights.values(), *segment.slices.values())
    }
    shapes = {name: shapes[name] for name in sorted(named)}
    tensors = StoredTensors(model, tuple(shapes), captured.constants, parts, quantisation)
    return StoredModel(captured.segments, plain, shapes, tensors, captured.decoding, captured.cache_shape)


class StoredTensors(Mapping[str, Tensor]):
    """Tensors as a package stores them, each made when it is asked for.

    The parts of the matrix that was asked for last are kept, so that each matrix is read and quantised once if its
    parts are asked for one after another.

    Args:
        model: model that the values are read from.
        names: names of all tensors that the segments name.
        constants: tensors that the recording made, by name.
        parts: quantised tensors, each with the matrix it is a part of, by name.
        quantisation: format of frozen matrices.
    """

    def __init__(
        self,
        model: LoadedModel,
        names: tuple[str, ...],
        constants: Mapping[str, Tensor],
        parts: Mapping[str, StoredPart],
        quantisation: str,
    ) -> None:
        self._model = model
        self._names = names
        self._constants = constants
        self._parts = parts
        self._quantisation = quantisation
        self._last: tuple[tuple[str, str], dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name in self._constants:
            return self._constants[name]
        if name not in self._parts:
            return self._model.tensor(name)
        part = self._parts[name]
        matrix = (part.source, part.kind)
        if self._last is None or self._last[0] != matrix:
            self._last = None
            made = quantise(self._model.tensor(part.source), part.kind, self._quantisation)
            self._last = (matrix, made)
        return self._last[1][part.suffix]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WrittenTensors(Mapping[str, Tensor]):
    """Tensors read back from the files of a package that is being written; the rest from elsewhere.

    Args:
        folder: folder of the package.
        references: place of each written tensor, by name.
        others: tensors that are not frozen, by name.
    """

    def __init__(
        self, folder: Path, references: Mapping[str, TensorRef], others: Mapping[str, Tensor]
    ) -> None:
        self._folder = folder
        self._references = references
        self._others = others

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._references:
            return self._others[name]
        reference = self._references[name]
        count = int(np.prod(reference.shape, dtype=np.int64))
        array = np.fromfile(
            self._folder / reference.file, dtype=reference.dtype, count=count, offset=reference.offset
        )
        return torch.from_numpy(array.reshape(reference.shape))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._references, *self._others))

    def __len__(self) -> int:
        return len(self._references) + len(self._others)
