"""Which tensors a task trains, and how. Device and coordinator must agree on this to the last tensor."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from edge_runtime.package.held import moved_part
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.protocol.messages import Task
from edge_runtime.slices.kinds import KINDS


def estimated_slices(task: Task, specs: Sequence[SliceSpec]) -> list[SliceSpec]:
    """The slices whose gradient a task's estimator finds, in the task's order.

    LoRA's A is left out where it is frozen, and so is what no device moves; the head comes last where it is perturbed
    like a slice.

    Args:
        task: settings of the training.
        specs: the task's slices and the package's head, if it has one; other slices are passed over.
    """
    named = {spec.name: spec for spec in specs}
    slices = [trained_part(named[name], task.freeze_a) for name in task.slices if named[name].kind != "head"]
    return [*slices, *(_heads(task, specs) if task.head == "perturbed" else ())]


def exact_heads(task: Task, specs: Sequence[SliceSpec]) -> list[SliceSpec]:
    """The head, if the task trains it by its exact gradient; else nothing.

    Args:
        task: settings of the training.
        specs: the package's head, if it has one; slices are passed over.
    """
    return _heads(task, specs) if task.head == "exact" else []


def _heads(task: Task, specs: Sequence[SliceSpec]) -> list[SliceSpec]:
    return [spec for spec in specs if spec.kind == "head" and task.train_head]


def trained_part(spec: SliceSpec, freeze_a: bool) -> SliceSpec:
    """A slice, no head, with those of its tensors alone that are trained."""
    pair = KINDS[spec.kind].pair
    moved = moved_part(spec)
    if pair is None or not freeze_a:
        return moved
    return replace(moved, tensors=tuple(tensor for tensor in moved.tensors if tensor.name != pair[0]))
