"""The estimator of a task, and the programs that it needs. This is the only place that chooses."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.engines.engine import Engine
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prefix_cache import ExampleStore
from edge_runtime.memory.plan import ExecutionChoice, first_segment
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.protocol.messages import Task, Update
from edge_runtime.training.exact_gradient import ExactGradient
from edge_runtime.training.forward_mode import ForwardMode
from edge_runtime.training.head_only import HeadOnly
from edge_runtime.training.step import Estimator, LocalWork
from edge_runtime.training.zero_order import ZeroOrder

ESTIMATORS: dict[Update, type[ForwardMode] | type[ZeroOrder] | type[ExactGradient]] = {
    "forward": ForwardMode,
    "zero_order": ZeroOrder,
    "backprop": ExactGradient,
}


def estimator_of(work: LocalWork) -> Estimator:
    """The estimator that a task asks for; :class:`HeadOnly` where no slice is trained."""
    return ESTIMATORS[work.task.update](work) if work.estimated_slices else HeadOnly(work)


def executor_of(
    task: Task,
    prepared: PreparedPackage,
    engine: Engine,
    choice: ExecutionChoice,
    cache: ExampleStore | None = None,
    spill_folder: Path | None = None,
) -> Executor:
    """Programs for a task's estimator, loaded.

    Args:
        task: names of the slices, and the kind of update.
        prepared: the package, prepared for this machine.
        engine: loader of the programs.
        choice: whether weights stay in memory.
        cache: store for what the segments before the first slice give; None computes it every time.
        spill_folder: folder in which an exact gradient keeps its layer inputs; None keeps them in memory.
    """
    if task.update == "backprop" and first_segment(prepared.manifest, task.slices) is not None:
        return Backpropagation(prepared, engine, task.slices, choice.weights, cache, spill_folder)
    carries = task.update == "forward"
    return Executor(prepared, engine, task.slices, choice.weights, cache, carries_tangents=carries)
