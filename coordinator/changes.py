"""What a result brings: the change of the tensors its task trained, checked and read by the task alone."""

from __future__ import annotations

from edge_runtime.messages import Task
from edge_runtime.package import Manifest, SliceSpec
from edge_runtime.slices import Values, decode_values


def trained_specs(manifest: Manifest, task: Task) -> list[SliceSpec]:
    """The slices whose change a task must bring: its own, and the head if it trains it; in the package's order."""
    return [
        spec
        for spec in manifest.slices
        if (task.train_head if spec.kind == "head" else spec.name in task.slices)
    ]


def read_change(manifest: Manifest, task: Task, data: bytes) -> Values:
    """The change of every tensor a task trained.

    Args:
        manifest: of the task's package. task: as it was signed. data: what the result brought.

    Raises:
        SliceError: a tensor is missing, unknown, of another shape or type, or not finite; names it.
    """
    return decode_values(data, trained_specs(manifest, task))
