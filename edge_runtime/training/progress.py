"""How far a task has come, kept in a file, so that a process that was stopped goes on at the step where it stood.

What a step computes depends on its number, on the values and on nothing else that happened before. So the number of the
next step and the optimiser's state are all it takes to come to the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.decoding import MALFORMED
from edge_runtime.durable import write_durably
from edge_runtime.errors import WorkerError
from edge_runtime.protocol.messages import Count, Sha256

log = logging.getLogger(__name__)

#: Seconds between two writes, for each MiB that is written: flash wears out by writing.
WRITE_EVERY_S = 60.0
_MIB = 1 << 20
Array = NDArray[Any]


class Progress(Struct, frozen=True):
    """A task in its middle.

    Attributes:
        number: number of the next step, or of the next group of rows.
        applied: numbers of the steps whose gradient was taken.
        seen: number of rows that entered them.
        loss_sum: sum of the losses of these rows.
        tensors: everything else, by name; see whoever keeps it.
    """

    number: int
    applied: tuple[int, ...]
    seen: int
    loss_sum: float
    tensors: Mapping[str, Array]


class _Record(Struct, frozen=True):
    """A progress as it is written; ``tensors`` are safetensors."""

    work: Sha256
    number: Count
    applied: Annotated[tuple[Count, ...], Meta(max_length=1 << 24)]
    seen: Count
    loss_sum: float
    tensors: bytes


class Keeper:
    """Keeps a task's progress: when the process is told to stop, and from time to time.

    Args:
        path: the file.
        work: digest of all that the task's outcome depends on. Progress of other work is not taken up.
        told_to_stop: function that says whether the process was told to stop.
        clock: source of the time in seconds.
    """

    def __init__(
        self,
        path: Path,
        work: str,
        told_to_stop: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._work, self._told_to_stop, self._clock = path, work, told_to_stop, clock
        self._due_s = clock() + WRITE_EVERY_S

    def before(self) -> Progress | None:
        """How far this work had come; None if it has not begun, or what is there cannot be used."""
        try:
            record = msgspec.msgpack.decode(self._path.read_bytes(), type=_Record)
            tensors = load(record.tensors)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, *MALFORMED, KeyError, TypeError) as error:
            log.warning(
                "event=progress_unreadable error=%s message=the task begins anew", type(error).__name__
            )
            return None
        if record.work != self._work:
            return None
        log.info("event=resumed step=%d", record.number)
        return Progress(record.number, record.applied, record.seen, record.loss_sum, tensors)

    def after_step(self, progress: Callable[[], Progress], *, from_time_to_time: bool = True) -> None:
        """Keep the progress if it is time to.

        Args:
            progress: function that gives the progress after a step.
            from_time_to_time: whether to write even if nobody told the process to stop.

        Raises:
            WorkerError: the process was told to stop, and has kept its progress if the disk let it.
        """
        stops = self._told_to_stop()
        if not stops and not (from_time_to_time and self._clock() >= self._due_s):
            return
        found = progress()
        self._write(found)
        if stops:
            raise WorkerError(f"the worker was told to stop, and did before step {found.number}")

    def _write(self, found: Progress) -> None:
        record = _Record(
            self._work, found.number, found.applied, found.seen, found.loss_sum, _saved(found.tensors)
        )
        data = msgspec.msgpack.encode(record)
        self._due_s = self._clock() + WRITE_EVERY_S * max(1.0, len(data) / _MIB)
        try:
            write_durably(self._path, data, mode=0o600)
        except OSError as error:  # the work itself goes on
            log.warning("event=progress_not_kept error=%s", error.strerror)


def _saved(tensors: Mapping[str, Array]) -> bytes:
    return bytes(save({name: np.ascontiguousarray(array) for name, array in tensors.items()}))
