"""What a result brings: the change of the tensors its task trained, checked and read by the task alone."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from edge_runtime.messages import Task
from edge_runtime.package import Manifest, SliceSpec
from edge_runtime.replay import decode_report, replay
from edge_runtime.slices import Values, decode_values, shapes


def trained_specs(manifest: Manifest, task: Task) -> list[SliceSpec]:
    """The slices whose change a task must bring: its own, and the head if it trains it; in the package's order.

    Of LoRA slices whose A is frozen, B alone is among their tensors.
    """
    return [
        _without_a(spec) if task.freeze_a and spec.kind == "lora" else spec
        for spec in manifest.slices
        if (task.train_head if spec.kind == "head" else spec.name in task.slices)
    ]


def check_change(manifest: Manifest, task: Task, data: bytes) -> None:
    """Check what a result brought, without the work of making a change of it.

    Args:
        manifest: of the task's package. task: as it was signed. data: safetensors bytes from outside.

    Raises:
        SliceError: a tensor is missing, unknown, of another shape or type, or not finite; or a report of scalars
            tells of more steps, draws or examples than the task has. Names it.
    """
    if task.report == "scalars":
        decode_report(data, task, _exact(manifest, task))
    else:
        decode_values(data, trained_specs(manifest, task))


def read_change(manifest: Manifest, task: Task, values: Values, data: bytes) -> Values:
    """The change of every tensor a task trained, float32 by flat name; of scalars it is computed again.

    Args:
        manifest, task, data: as for :func:`check_change`.
        values: of all slices, as the task came with them.

    Returns:
        a change that may be infinite where numbers of a report were enormous: the caller checks.
    """
    if task.report != "scalars":
        return decode_values(data, trained_specs(manifest, task))
    exact = _exact(manifest, task)
    replayed = [spec for spec in trained_specs(manifest, task) if spec not in exact]
    report = decode_report(data, task, exact)
    with np.errstate(over="ignore", invalid="ignore"):
        change = replay(task, replayed, values, report)
    return change | {name: report[name] for name in shapes(exact)}


def _exact(manifest: Manifest, task: Task) -> list[SliceSpec]:
    """The head, unless it was perturbed like a slice: its gradient is exact, so its change travels as it is."""
    exact = task.head == "exact"
    return [spec for spec in trained_specs(manifest, task) if exact and spec.kind == "head"]


def _without_a(spec: SliceSpec) -> SliceSpec:
    return replace(spec, tensors=tuple(tensor for tensor in spec.tensors if tensor.name != "A"))
