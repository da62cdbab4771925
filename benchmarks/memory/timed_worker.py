"""Child program: the worker's own job, with a clock beside its loop.

Takes a job from standard input as ``edge_runtime.worker.main`` does. Writes as JSON the seconds of every whole training
step (tangents, batches, sweep, gradient and optimiser) or of every evaluated group, and the numbers of rows that ran at
a time. Memory is measured on the worker itself, never on this program.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from edge_runtime.data.batches import Batch
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training import estimators, loop
from edge_runtime.training.optimizers import Optimizer, make_optimizer
from edge_runtime.worker import main as worker
from edge_runtime.worker.jobs import Job, TrainJob

step_ends: list[float] = []
sweep_seconds: list[float] = []
group_rows: set[int] = set()


class TimedExecutor(Executor):
    """An executor that keeps how long each sweep takes, and how many rows it runs at a time."""

    def sweep(self, values: Values, micro_batches: Sequence[Batch], *rest: Any, **named: Any) -> Sweep:
        """Sweep, with a clock."""
        group_rows.update(len(batch.labels) for batch in micro_batches)
        started = time.perf_counter()
        result = super().sweep(values, micro_batches, *rest, **named)
        sweep_seconds.append(time.perf_counter() - started)
        return result


class TimedOptimizer:
    """An optimiser that keeps when each step ends."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.values, self.delta = optimizer.values, optimizer.delta

    def step(self, gradient: Values) -> None:
        """Take the step, and keep the time."""
        self._optimizer.step(gradient)
        step_ends.append(time.perf_counter())


def timed_optimizer(settings: LocalOptimizer, start: Values, trained: list[str]) -> Optimizer:
    """The worker's own optimiser, with a clock."""
    return TimedOptimizer(make_optimizer(settings, start, trained))


def main() -> None:
    """Do the job and write the seconds; the first step, whose start is not known, is left out."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    vars(loop).update(make_optimizer=timed_optimizer)
    for module in (worker, estimators):
        vars(module).update(Executor=TimedExecutor)
    worker.run(job)
    training = isinstance(job, TrainJob)
    seconds = [end - start for start, end in pairwise(step_ends)] if training else sweep_seconds
    json.dump(
        {"seconds": seconds, "sweep_seconds": sweep_seconds, "group_rows": sorted(group_rows)}, sys.stdout
    )


if __name__ == "__main__":
    main()
