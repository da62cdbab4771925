"""Values of trainable tensors, checked against their specification and carried as safetensors.

Values are a flat dict ``"slice/tensor" -> float32 array``. In this form they travel, are hashed and are updated by
optimisers; one naming rule serves all three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import SliceError
from edge_runtime.package.block_head import BLOCKS, EXITS, POOLING
from edge_runtime.package.manifest import Manifest, SliceSpec

FloatArray = NDArray[np.float32]
Values = dict[str, FloatArray]
#: Prefix of the flat names of the head's tensors.
HEAD_PREFIX = "head/"


def key(slice_name: str, tensor_name: str) -> str:
    """Flat name of a trainable tensor."""
    return f"{slice_name}/{tensor_name}"


def shapes(specs: Iterable[SliceSpec]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the given slices, by flat name, in the order of the slices."""
    return {key(spec.name, tensor.name): tensor.shape for spec in specs for tensor in spec.tensors}


def encode_values(values: Mapping[str, FloatArray], manifest: Manifest | None = None) -> bytes:
    """Safetensors bytes of values. Equal values give equal bytes, because tensors are written in name order.

    Args:
        values: values by flat name.
        manifest: the package's manifest, as the run sees it. Where its head reads several blocks, the file's metadata
            say which, and how they are pooled, so that it can be used by itself
            (:func:`edge_runtime.package.block_head.head_of`).
    """
    arrays = {name: np.ascontiguousarray(values[name], dtype=np.float32) for name in sorted(values)}
    metadata = None
    if manifest is not None and manifest.head_blocks:
        metadata = {BLOCKS: " ".join(map(str, manifest.head_blocks)), POOLING: manifest.head_features}
        if manifest.head_exits:
            metadata[EXITS] = " ".join(map(str, manifest.head_exits))
    return bytes(save(arrays)) if metadata is None else _with_metadata(bytes(save(arrays)), metadata)


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata, in a fixed order: the library writes several keys in a random one.

    A file is eight bytes with the length of a JSON header, the header, and the data that its offsets count from
    (safetensors' README, "Format").
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = msgspec.json.encode({"__metadata__": dict(metadata), **msgspec.json.decode(data[8:end])})
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def decode_values(data: bytes, specs: Iterable[SliceSpec]) -> Values:
    """Parse and check values.

    Args:
        data: safetensors bytes from outside.
        specs: slices that must be present, all of them and no other.

    Raises:
        SliceError: the bytes are not safetensors; or a tensor is missing, unknown, of another shape or dtype, or holds
            a value that is not finite. Names the tensor.
    """
    try:
        values = load(data)
    except (SafetensorError, *MALFORMED, KeyError, TypeError) as error:
        raise SliceError(f"slice values are not a safetensors file: {error}") from error
    expected = shapes(specs)
    if unknown := sorted(set(values) - set(expected)):
        raise SliceError(f"unknown slice tensor {unknown[0]}; expected {', '.join(sorted(expected))}")
    for name, shape in expected.items():
        if name not in values:
            raise SliceError(f"slice tensor {name} is missing")
        array = values[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise SliceError(f"slice tensor {name} is {array.dtype}{array.shape}, expected float32{shape}")
        if not np.isfinite(array).all():
            raise SliceError(f"slice tensor {name} holds a value that is not finite")
    return {name: values[name] for name in expected}
