"""What a result brings: the delta of the tensors its task trained, checked and read by the task alone."""

from __future__ import annotations

from edge_runtime.package.manifest import Manifest, SliceSpec
from edge_runtime.package.slices import Values, decode_values, shapes
from edge_runtime.protocol.messages import Task
from edge_runtime.training.replay import decode_report, replay
from edge_runtime.training.trainable import estimated, exact


def trained_specs(manifest: Manifest, task: Task) -> list[SliceSpec]:
    """The slices whose delta a task must bring: its own, without a frozen A, and the head if it trains it."""
    return [*estimated(task, manifest.slices), *exact(task, manifest.slices)]


def check_delta(manifest: Manifest, task: Task, data: bytes) -> None:
    """Check what a result brought, without the work of making a delta of it.

    Args:
        manifest: of the task's package. task: as it was signed. data: safetensors bytes from outside.

    Raises:
        SliceError: a tensor is missing, unknown, of another shape or type, or not finite; or a report of scalars
            tells of more steps, draws or examples than the task has. Names it.
    """
    if task.report == "scalars":
        decode_report(data, task, manifest.slices)
    else:
        decode_values(data, trained_specs(manifest, task))


def read_delta(
    manifest: Manifest, task: Task, values: Values, data: bytes, reference: Values | None = None
) -> Values:
    """The delta of every tensor a task trained, float32 by flat name; of scalars it is computed again.

    Args:
        manifest, task, data: as for :func:`check_delta`.
        values: of all slices, as the task came with them.
        reference: what the task's directions were compared with, if it names such a thing.

    Raises:
        SliceError: numbers of a report are so large that no finite delta comes of them.
    """
    if task.report != "scalars":
        return decode_values(data, trained_specs(manifest, task))
    report = decode_report(data, task, manifest.slices)
    delta = replay(task, manifest.slices, values, report, reference)
    return delta | {name: report[name] for name in shapes(exact(task, manifest.slices))}
