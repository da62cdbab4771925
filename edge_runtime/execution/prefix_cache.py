"""Hidden states at the entry of the first trained slice, kept on disk for later steps of a task.

Segments before that slice hold nothing that a task changes, so their outputs for an example, padded to a given length,
are the same in every step. The cache is one file without a name, which is gone when the process ends. What does not fit
into it is computed again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from edge_runtime.engines.engine import Array

#: An example: its row in the device's data, and the length it is padded to.
Example = tuple[int, int]


@dataclass(frozen=True)
class _Entry:
    """Place of an array in the file.

    Attributes:
        offset: offset in bytes.
        dtype: dtype of the array.
        shape: shape of the array.
    """

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


class ExampleStore(Protocol):
    """What an executor needs of a cache: arrays by example and name. It may forget them at any time."""

    def load(self, example: Example) -> dict[str, Array] | None:
        """The arrays of an example as they were stored; None if it is not there."""
        ...

    def store(self, example: Example, arrays: Mapping[str, Array]) -> None:
        """Keep the arrays of an example, if there is room."""
        ...


class PrefixCache:
    """A bounded store of arrays by example and name.

    Args:
        folder: folder of the file that holds them.
        limit_bytes: largest size of that file.

    Attributes:
        hits: number of examples that were looked up and found.
        misses: number of examples that were looked up and not found.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the cache
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._entries: dict[Example, dict[str, _Entry]] = {}
        self.hits = self.misses = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def load(self, example: Example) -> dict[str, Array] | None:
        """The arrays of an example as they were stored; None if it is not there."""
        entries = self._entries.get(example)
        if entries is None:
            self.misses += 1
            return None
        self.hits += 1
        return {name: self._read(entry) for name, entry in entries.items()}

    def store(self, example: Example, arrays: Mapping[str, Array]) -> None:
        """Keep the arrays of an example. Nothing happens if they exceed the limit or the disk is full."""
        size = sum(array.nbytes for array in arrays.values())
        if example in self._entries or self._used_bytes + size > self._limit_bytes:
            return
        entries, offset = {}, self._used_bytes
        try:
            for name, array in arrays.items():
                entries[name] = _Entry(offset, array.dtype, array.shape)
                written = os.pwrite(self._file.fileno(), np.ascontiguousarray(array).data, offset)
                if written != array.nbytes:
                    return
                offset += written
        except OSError:  # a full disk makes the task slower, not impossible
            self._limit_bytes = self._used_bytes
            return
        self._used_bytes = offset
        self._entries[example] = entries

    def _read(self, entry: _Entry) -> Array:
        array = np.empty(entry.shape, entry.dtype)
        if os.preadv(self._file.fileno(), [array.reshape(-1).data], entry.offset) != array.nbytes:
            raise OSError("the prefix cache lost a part of its file")
        return array
