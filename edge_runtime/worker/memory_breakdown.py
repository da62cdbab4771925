"""Breakdown of a worker's memory: the parts of the prediction, measured in the worker that does the task.

Parts are told apart by when memory appears and by its kind:

- libraries: resident memory before the job, less library code that was given back;
- tokenizer: anonymous memory that its work left behind;
- engine: anonymous memory that came with its programs, and library pages that came since the start;
- weights: resident pages of files in the package's folders;
- waiting: arrays that wait between segments, and slices: copies of their values, both counted by this project itself;
- live: all other anonymous memory that the steps added.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.execution.executor import Executor
from edge_runtime.execution.flow import Flow
from edge_runtime.memory.meter import mapped_bytes, read_memory, status_bytes
from edge_runtime.memory.plan import SLICE_COPIES
from edge_runtime.package.slices import Values
from edge_runtime.worker.jobs import BinMeasure, StepMeasure

#: Largest number of steps whose measurements are kept: all, or every second, every fourth and so on from the first.
MAX_STEPS = 1024


class MemoryBreakdown:
    """Measures memory at the moments of a job, from which :meth:`bins` makes the breakdown.

    Args:
        floor_bytes: resident memory before the job.
        folders: package folder and prepared folder.
    """

    def __init__(self, floor_bytes: int, folders: Sequence[Path]) -> None:
        self._started_s = time.monotonic()
        self._floor_bytes = floor_bytes
        self._folders = tuple(folders)
        self._floor_file_bytes = status_bytes("RssFile")
        self._tokenizer_bytes = 0
        self._anonymous_bytes = status_bytes("RssAnon")
        self._engine_bytes = 0
        self._loaded_bytes = 0
        self._weights_bytes = 0
        self._waiting_bytes = 0
        self._steps: list[StepMeasure] = []
        self._stride, self._seen = 1, 0
        self._executor: Executor | None = None

    def tokenised(self) -> None:
        """Measure after the rows became token ids and the tokenizer is gone."""
        before, self._anonymous_bytes = self._anonymous_bytes, status_bytes("RssAnon")
        self._tokenizer_bytes = max(0, self._anonymous_bytes - before)

    def loaded(self, executor: Executor) -> None:
        """Measure after the programs were loaded. From here on added memory belongs to the steps.

        The first step is observed segment by segment.
        """
        self._loaded_bytes = status_bytes("RssAnon")
        self._engine_bytes = max(0, self._loaded_bytes - self._anonymous_bytes)
        self._executor = executor
        executor.observe = self._observe

    def stepped(self) -> None:
        """Measure after a step."""
        if self._executor is not None:
            self._executor.observe = None
            self._executor = None
        if self._seen % self._stride == 0:
            self._steps.append(self._step())
        self._seen += 1
        if len(self._steps) == MAX_STEPS:
            self._steps = self._steps[::2]
            self._stride *= 2

    @property
    def steps(self) -> tuple[StepMeasure, ...]:
        """Measurements of the steps that were kept."""
        return tuple(self._steps)

    def bins(self, values: Values) -> tuple[BinMeasure, ...]:
        """The breakdown, after the last step.

        Args:
            values: values of all slices.
        """
        own_bytes = SLICE_COPIES * sum(value.nbytes for value in values.values())
        _, library_bytes = mapped_bytes(self._folders)
        # Library pages: those given back since the start, or those that came since.
        library_change = library_bytes - self._floor_file_bytes
        grown = status_bytes("RssAnon") - self._loaded_bytes
        parts = {
            "libraries": self._floor_bytes + min(0, library_change),
            "tokenizer": self._tokenizer_bytes,
            "engine": self._engine_bytes + max(0, library_change),
            "weights": self._weights_bytes,
            "live": max(0, grown - self._waiting_bytes - own_bytes),
            "waiting": self._waiting_bytes,
            "slices": own_bytes,
        }
        return tuple(BinMeasure(name, size) for name, size in parts.items())

    def _step(self) -> StepMeasure:
        memory = read_memory(os.getpid())
        resident_bytes, anonymous_bytes = (
            (memory.resident_bytes, memory.anonymous_bytes) if memory else (0, 0)
        )
        return StepMeasure(time.monotonic() - self._started_s, resident_bytes, anonymous_bytes)

    def _observe(self, flows: Sequence[Flow]) -> None:
        inside, _ = mapped_bytes(self._folders)
        self._weights_bytes = max(self._weights_bytes, inside)
        waiting = sum(array.nbytes for flow in flows for array in flow.values())
        self._waiting_bytes = max(self._waiting_bytes, waiting)
