"""Training by a formula: what a device hands in depends on its name and its task alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edge_runtime.package.held import moved_part
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import PER_EXAMPLE, Task
from edge_runtime.training.replay import SCALARS, STEPS


def delta_of(specs: Iterable[SliceSpec], task: Task, name: str, scale: float = 1.0) -> Values:
    """The delta that a device hands in, by flat name.

    Args:
        specs: all slices of the package.
        task: the task.
        name: name of the device.
        scale: factor of all entries.
    """
    names = {*task.slices, *(("head",) if task.train_head else ())}
    generator = np.random.default_rng([task.round, task.slot, *name.encode()])
    return {
        f"{spec.name}/{tensor.name}": (scale * generator.standard_normal(tensor.shape)).astype(np.float32)
        for spec in specs
        for tensor in moved_part(spec).tensors
        if spec.name in names and not (task.freeze_a and tensor.name == "A")
    }


def report_of(specs: Iterable[SliceSpec], task: Task, name: str) -> Values:
    """What a device hands in of a task that asks for scalars: numbers of all its steps, and the head's delta."""
    batch = task.batch_size if task.directions in PER_EXAMPLE else 1
    generator = np.random.default_rng([task.round, task.slot, *name.encode()])
    heads = [spec for spec in specs if spec.name == "head"]
    return {
        SCALARS: generator.standard_normal((task.steps, task.draws, batch)).astype(np.float32),
        STEPS: np.arange(task.steps, dtype=np.float32),
        **delta_of(heads, task, name),
    }


def examples_of(task: Task) -> int:
    """Number of examples that it says are behind it."""
    return 4 + task.slot
