"""Frozen tensors of a segment, memory-mapped from the weight files of the package or of the prepared folder.

An embedding is read by rows, a few hundred of some thirty thousand. Mapping it would make far more of it resident,
because the kernel maps sixteen pages around each page that is touched. So its rows are read one by one instead
(:class:`GatheredRows`).
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PackageError
from edge_runtime.package.manifest import TensorRef
from edge_runtime.package.prepared import PreparedPackage


class MappedWeights:
    """Views of one segment's tensors, which must not be written to.

    Their pages are clean and file-backed: the kernel may drop them at any time and read them again.

    Args:
        prepared: the package, prepared for this machine.
        segment: index of the segment.
        gathered: names of tensors of which only rows are read; their rows are zero until :meth:`gather`.

    Attributes:
        arrays: tensors by name.
    """

    def __init__(self, prepared: PreparedPackage, segment: int, gathered: Collection[str] = ()) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self._gathered: dict[str, GatheredRows] = {}
        self.arrays: dict[str, NDArray[np.generic]] = {}
        for name, tensor in prepared.prepared.segments[segment].tensors.items():
            if name in gathered:
                self._gathered[name] = GatheredRows(*prepared.weight_path(segment, tensor.file), tensor)
                self.arrays[name] = self._gathered[name].array
                continue
            if tensor.file not in self._maps:
                self._maps[tensor.file] = _map(*prepared.weight_path(segment, tensor.file))
            self.arrays[name] = _view(self._maps[tensor.file], tensor)

    def gather(self, name: str, rows: NDArray[np.int64]) -> None:
        """Read these rows of a gathered tensor into place."""
        self._gathered[name].fill(rows)

    def drop_rows(self) -> None:
        """Give back the memory of all gathered rows."""
        for tensor in self._gathered.values():
            tensor.clear()

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the mapped files."""
        return tuple(self._maps)

    def prefetch(self) -> None:
        """Ask the kernel to read the files ahead, in the background; no page becomes resident in this process."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Give the pages back. The process then holds none of them; touching one brings it back."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


class GatheredRows:
    """A table whose rows are read from its file when they are needed.

    Args:
        path: the weight file.
        expected_bytes: size that the file must have.
        tensor: place and shape of the table in the file.

    Attributes:
        array: array with the table's shape; it takes no memory for a row that was not filled.
    """

    def __init__(self, path: Path, expected_bytes: int, tensor: TensorRef) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PackageError(f"cannot read {path}: {error.strerror}; fetch the package again") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._path, self._offset = path, tensor.offset
        size = int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
        if path.stat().st_size != expected_bytes or tensor.offset + size > expected_bytes:
            raise PackageError(f"{path} is not {expected_bytes} bytes long; fetch the package again")
        self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array: NDArray[np.generic] = np.frombuffer(self._memory, dtype=tensor.dtype).reshape(
            tensor.shape
        )
        self._row_bytes = size // tensor.shape[0]

    def fill(self, rows: NDArray[np.int64]) -> None:
        """Read rows into place, each once, however often it is named."""
        view = memoryview(self._memory)
        for row in np.unique(rows).tolist():
            start = row * self._row_bytes
            target = view[start : start + self._row_bytes]
            if os.preadv(self._descriptor, [target], self._offset + start) != self._row_bytes:
                raise PackageError(f"{self._path} ends before row {row}; fetch the package again")

    def clear(self) -> None:
        """Give the memory of all rows back."""
        self._memory.madvise(mmap.MADV_DONTNEED)


def _map(path: Path, expected_bytes: int) -> mmap.mmap:
    try:
        with path.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise PackageError(f"cannot map {path}: {error}; fetch or export the package again") from error
    if len(mapped) != expected_bytes:
        raise PackageError(f"{path} has {len(mapped)} bytes, not {expected_bytes}; fetch or prepare it again")
    return mapped


def _view(mapped: mmap.mmap, tensor: TensorRef) -> NDArray[np.generic]:
    dtype = np.dtype(tensor.dtype)
    count = int(np.prod(tensor.shape, dtype=np.int64))
    if tensor.offset + count * dtype.itemsize > len(mapped):
        raise PackageError(
            f"a tensor in {tensor.file} ends past the end of the file; export the package again"
        )
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=tensor.offset).reshape(tensor.shape)
