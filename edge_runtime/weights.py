"""Frozen tensors of a segment, memory-mapped from the package's weight files."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import PackageError
from edge_runtime.package import Package, Segment, TensorRef


class MappedWeights:
    """Read-only views of one segment's tensors.

    Pages are clean and file-backed: the kernel may drop them at any time and read them again.
    """

    def __init__(self, package: Package, segment: Segment) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self.arrays: dict[str, NDArray[np.generic]] = {}
        for name, tensor in segment.weights.items():
            if tensor.file not in self._maps:
                self._maps[tensor.file] = _map(package, tensor.file)
            self.arrays[name] = _view(self._maps[tensor.file], tensor)

    def release_pages(self) -> None:
        """Tell the kernel the mapped pages are not needed now; they come back when touched."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


def _map(package: Package, file: str) -> mmap.mmap:
    path = package.path(file)
    try:
        with path.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise PackageError(f"cannot map {path}: {error}; fetch or export the package again") from error
    if len(mapped) != package.manifest.files[file].bytes:
        raise PackageError(f"{path} has {len(mapped)} bytes, not what its manifest says; fetch it again")
    return mapped


def _view(mapped: mmap.mmap, tensor: TensorRef) -> NDArray[np.generic]:
    dtype = np.dtype(tensor.dtype)
    count = int(np.prod(tensor.shape, dtype=np.int64))
    if tensor.offset + count * dtype.itemsize > len(mapped):
        raise PackageError(
            f"a tensor in {tensor.file} ends past the end of the file; export the package again"
        )
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=tensor.offset).reshape(tensor.shape)
