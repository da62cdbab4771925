"""Who trains: this process, one task after another, or others at the same time. What comes back is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from coordinator.simulation.workbench import Job, Workbench

#: A function that waits for an encoded result.
Pending = Callable[[], bytes]


class Trainer(Protocol):
    """What takes tasks and gives their encoded results."""

    def submit(self, job: Job) -> Pending:
        """Begin a task, or remember it; what comes back waits for its result, and raises what training raised."""
        ...


class HereTrainer:
    """A trainer in this process. It trains when a result is asked for: one that nobody takes is never computed.

    Args:
        bench: bench that does the tasks.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    def submit(self, job: Job) -> Pending:
        """See :class:`Trainer`."""
        return lambda: self._bench.train(job)
