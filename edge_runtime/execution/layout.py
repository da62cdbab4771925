"""Weights in the layout of an arithmetic, made from the package's block-wise levels and scales.

With w the dequantised matrix (N outputs, K inputs), ``row_int8`` stores round(w / s)ᵀ as int8 (K, N) and s = max|w| /
limit for each output; ``float`` stores wᵀ as float32 (K, N); ``block_int8`` and ``block_int4`` are what the package
holds already.

A matrix is converted a few rows at a time and its pages are given back, so the memory this takes does not depend on the
model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.execution.weights import MappedWeights
from edge_runtime.package.manifest import (
    BLOCK_ARITHMETICS,
    FLOAT_SUFFIX,
    INT8_SCALES_SUFFIX,
    INT8_SUFFIX,
    LEVELS_SUFFIX,
    SCALES_SUFFIX,
    ZERO_POINTS_SUFFIX,
    Arithmetic,
    TensorRef,
)
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage, PreparedSegment

STORED_ZERO_POINT = 128
#: Number of rows of a matrix that are converted at a time.
ROWS_AT_A_TIME = 64
TENSOR_ALIGNMENT_BYTES, PAGE_BYTES = 64, 4096


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix (N, K) as the package holds it, in 4 or 8 bits.

    Attributes:
        levels: uint8 (N, blocks, bytes of a block).
        scales: float32 (N, blocks).
        zero_points: levels of zero, 4 bits each, packed; None for a matrix of 8 bits.
    """

    levels: NDArray[np.generic]
    scales: NDArray[np.generic]
    zero_points: NDArray[np.generic] | None

    @classmethod
    def named(cls, stem: str, arrays: Mapping[str, NDArray[np.generic]]) -> StoredMatrix:
        """The matrix whose tensors have names that begin with ``stem``."""
        levels, scales = arrays[stem + LEVELS_SUFFIX], arrays[stem + SCALES_SUFFIX]
        return cls(levels, scales, arrays.get(stem + ZERO_POINTS_SUFFIX))

    @property
    def shape(self) -> tuple[int, int]:
        """(N outputs, K inputs)."""
        outputs, blocks, size = self.levels.shape
        return outputs, blocks * size * (1 if self.zero_points is None else 2)

    def dequantised(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Rows of the float32 matrix (N, K), a few at a time."""
        for start in range(0, self.levels.shape[0], ROWS_AT_A_TIME):
            rows = slice(start, min(start + ROWS_AT_A_TIME, self.levels.shape[0]))
            factors = self.scales[rows].astype(np.float32)[:, :, None]
            if self.zero_points is None:
                blocks = (self.levels[rows].astype(np.float32) - STORED_ZERO_POINT) * factors
            else:
                zeros = _unpacked(self.zero_points[rows])[:, : self.levels.shape[1], None]
                blocks = (_unpacked(self.levels[rows]) - zeros) * factors
            yield rows, blocks.reshape(blocks.shape[0], -1)


def _unpacked(packed: NDArray[np.generic]) -> NDArray[np.float32]:
    """Levels of 4 bits, two in a byte along the last axis with the even one low."""
    levels = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
    levels[..., ::2] = packed.view(np.uint8) & 15
    levels[..., 1::2] = packed.view(np.uint8) >> 4
    return levels


def is_matrix(name: str, tensor: TensorRef) -> bool:
    """Whether a tensor is the levels of a quantised matrix (not of an embedding)."""
    return name.endswith(LEVELS_SUFFIX) and len(tensor.shape) == 3


def lay_out(
    package: Package, folder: Path, index: int, arithmetic: Arithmetic, limit: int
) -> PreparedSegment:
    """Write one segment's tensors in the arithmetic's layout, or refer to the package's where they are the same.

    Args:
        package: the package, as exported.
        folder: folder that the segment's file goes to.
        index: index of the segment.
        arithmetic: arithmetic for which the tensors are laid out.
        limit: largest level of int8 weights.
    """
    segment = package.manifest.segments[index]
    matrices = [name for name, tensor in segment.weights.items() if is_matrix(name, tensor)]
    if arithmetic in BLOCK_ARITHMETICS or not matrices:
        return PreparedSegment(True, segment.weights)
    stored = MappedWeights(PreparedPackage.as_stored(package), index).arrays
    file = f"{segment.name}.bin"
    tensors: dict[str, TensorRef] = {}
    with (folder / file).open("w+b") as out:
        for name in matrices:
            stem = name.removesuffix(LEVELS_SUFFIX)
            matrix = StoredMatrix.named(stem, stored)
            if arithmetic == "float":
                reference = _reserve(out, file, "float32", matrix.shape[::-1])
                _write_float(out, reference, matrix)
                tensors[stem + FLOAT_SUFFIX] = reference
                continue
            row_scales = _row_scales(matrix, limit)
            reference = _reserve(out, file, "int8", matrix.shape[::-1])
            _write_int8(out, reference, matrix, row_scales)
            tensors[stem + INT8_SUFFIX] = reference
            tensors[stem + INT8_SCALES_SUFFIX] = _append(out, file, row_scales)
        stems = [name.removesuffix(LEVELS_SUFFIX) for name in matrices]
        suffixes = (LEVELS_SUFFIX, SCALES_SUFFIX, ZERO_POINTS_SUFFIX)
        converted = {stem + suffix for stem in stems for suffix in suffixes}
        for name in segment.weights:
            if name not in converted:
                tensors[name] = _append(out, file, stored[name])
        out.seek(0, 2)
        out.write(b"\0" * (-out.tell() % PAGE_BYTES))
        # Written pages count against the cap until they are on disk.
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return PreparedSegment(False, tensors)


def _reserve(out: BinaryIO, file: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    out.seek(0, 2)
    out.write(b"\0" * (-out.tell() % TENSOR_ALIGNMENT_BYTES))
    reference = msgspec.convert(
        {"file": file, "offset": out.tell(), "dtype": dtype, "shape": shape}, TensorRef
    )
    out.flush()
    # Written through a map, a sparse file on a full disk would end the process by a signal.
    os.posix_fallocate(out.fileno(), reference.offset, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return reference


def _append(out: BinaryIO, file: str, array: NDArray[np.generic]) -> TensorRef:
    reference = _reserve(out, file, array.dtype.name, array.shape)
    out.seek(reference.offset)
    out.write(array.tobytes())
    return reference


def _row_scales(stored: StoredMatrix, limit: int) -> NDArray[np.float32]:
    """max|w| / limit of each output; 1 for a row of zeros."""
    largest = np.empty(stored.shape[0], np.float32)
    for rows, matrix in stored.dequantised():
        largest[rows] = np.abs(matrix).max(axis=1)
    return np.where(largest == 0, np.float32(1), largest / np.float32(limit)).astype(np.float32)


def _write_int8(
    out: BinaryIO, reference: TensorRef, stored: StoredMatrix, row_scales: NDArray[np.float32]
) -> None:
    target: NDArray[np.int8] = np.memmap(out, np.int8, "r+", reference.offset, reference.shape)
    for rows, matrix in stored.dequantised():
        target[:, rows] = np.rint(matrix / row_scales[rows, None]).astype(np.int8).T


def _write_float(out: BinaryIO, reference: TensorRef, stored: StoredMatrix) -> None:
    target: NDArray[np.float32] = np.memmap(out, np.float32, "r+", reference.offset, reference.shape)
    for rows, matrix in stored.dequantised():
        target[:, rows] = matrix.T
