"""Layer inputs kept for the backward sweep, in memory or in a file.

The backward sweep takes them in reverse order, so the file is a stack: it never holds more than one step's inputs, has
no name, and is gone when the step ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from edge_runtime.engines.engine import Array
from edge_runtime.errors import DeviceError
from edge_runtime.figures import size


class ActivationStore:
    """A stack of layer inputs, of which one segment's are pushed together.

    Args:
        folder: folder of the file that holds them; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder) if folder else None  # noqa: SIM115 - closed by close
        self._in_memory: list[list[Array]] = []
        self._in_file: list[list[tuple[int, np.dtype[np.generic], tuple[int, ...]]]] = []
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._in_memory.clear()
        if self._file is not None:
            self._file.close()

    @property
    def arrays(self) -> list[Array]:
        """All arrays that are in memory."""
        return [array for group in self._in_memory for array in group]

    def push(self, group: Sequence[Array]) -> None:
        """Keep the inputs of one segment, one array for each micro-batch.

        Raises:
            DeviceError: the disk is full; says how much is free there.
        """
        if self._file is None:
            self._in_memory.append(list(group))
            return
        self._in_file.append([(self._write(array), array.dtype, array.shape) for array in group])

    def pop(self) -> list[Array]:
        """The inputs that were pushed last, which are kept no longer."""
        if self._file is None:
            return self._in_memory.pop()
        entries = self._in_file.pop()
        self._end = min((offset for offset, _, _ in entries), default=self._end)
        return [self._read(*entry) for entry in entries]

    def _write(self, array: Array) -> int:
        offset, left = self._end, np.ascontiguousarray(array).reshape(-1).data.cast("B")
        self._end += len(left)
        try:
            position = offset
            while left:
                written = os.pwrite(self._descriptor, left, position)
                left, position = left[written:], position + written
        except OSError as error:
            free = shutil.disk_usage(self._folder or ".").free
            raise DeviceError(
                f"cannot keep layer inputs in {self._folder}: {error.strerror}; {size(free)} are free there; "
                "free some space, or grant a cap that keeps them in memory"
            ) from error
        return offset

    def _read(self, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        array = np.empty(shape, dtype)
        left = array.reshape(-1).data.cast("B")
        while left:
            read = os.preadv(self._descriptor, [left], offset)
            if read == 0:
                raise DeviceError(f"a file of layer inputs in {self._folder} lost its end; check the disk")
            left, offset = left[read:], offset + read
        return array

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise ValueError("these layer inputs are kept in memory")
        return self._file.fileno()
