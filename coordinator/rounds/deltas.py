"""What a result brings: the delta of the tensors that its task trained. Nothing but the task is needed to read it."""

from __future__ import annotations

from edge_runtime.package.manifest import Manifest, SliceSpec
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.ranks import with_rank
from edge_runtime.package.slices import Values, decode_values, shapes
from edge_runtime.protocol.messages import Task
from edge_runtime.training.line import without_line
from edge_runtime.training.methods import measures_line
from edge_runtime.training.protected import DoubleArray, decode_vector, layout_of, unflat
from edge_runtime.training.replay import decode_report, replay
from edge_runtime.training.sketch import decode_sketches
from edge_runtime.training.trainable import estimated_slices, exact_heads


def trained_specs(manifest: Manifest, task: Task) -> list[SliceSpec]:
    """The slices whose delta a task must bring: those it trains, without a frozen A, and the head if it trains that."""
    specs = with_rank(manifest, task.rank).slices
    return [*estimated_slices(task, specs), *exact_heads(task, specs)]


def check_delta(manifest: Manifest, task: Task, data: bytes) -> None:
    """Check what a result brought, without the work of making a delta of it.

    Args:
        manifest: manifest of the task's package.
        task: task that was signed.
        data: safetensors bytes from outside.

    Raises:
        SliceError: a tensor is missing, unknown, not finite, or of another shape or type; or a report of scalars
            tells of more steps, draws or examples than the task has. The message names it.
    """
    if task.noised:
        decode_vector(data, layout_of(task, manifest))
        return
    if measures_line(task):
        data, _ = without_line(data)
    if task.report == "scalars":
        decode_report(data, task, manifest.slices)
    elif task.report == "sketch":
        decode_sketches(data, task, manifest.slices)
    else:
        decode_values(data, trained_specs(manifest, task))


def read_delta(
    manifest: Manifest, task: Task, values: Values, data: bytes, reference: Values | None = None
) -> Values:
    """The delta of every tensor that a task trained, float32 by flat name; a report of scalars is replayed. Sketches
    stay what they are, in place of the tensors of their slices: they are found again in their mean.

    Args:
        manifest: manifest of the task's package.
        task: task that was signed.
        values: slice values that the task came with.
        data: safetensors bytes that :func:`check_delta` has let through.
        reference: deltas that the task's directions were compared with; None if the task names none.

    Raises:
        SliceError: numbers of a report are so large that no finite delta comes of them.
    """
    if task.noised:
        layout = layout_of(task, manifest)
        return of_vector(manifest, task, values, decode_vector(data, layout), reference)
    if measures_line(task):
        data, _ = without_line(data)
    if task.report == "sketch":
        return decode_sketches(data, task, manifest.slices)
    if task.report != "scalars":
        return decode_values(data, trained_specs(manifest, task))
    return _replayed(manifest, task, values, decode_report(data, task, manifest.slices), reference)


def of_vector(
    manifest: Manifest, task: Task, values: Values, vector: DoubleArray, reference: Values | None = None
) -> Values:
    """The delta of a contribution, or of a sum of some, that is one vector; its scalars are replayed.

    Args:
        manifest: manifest of the task's package.
        task: task that was signed, or any of those whose contributions were added up.
        values: slice values that the task came with.
        vector: float64 vector of the task's layout (:mod:`edge_runtime.training.protected`).
        reference: deltas that the task's directions were compared with; None if the task names none.

    Raises:
        SliceError: numbers of a report are so large that no finite delta comes of them.
    """
    tensors = unflat(layout_of(task, manifest), vector)
    return tensors if task.report != "scalars" else _replayed(manifest, task, values, tensors, reference)


def _replayed(
    manifest: Manifest, task: Task, values: Values, report: Values, reference: Values | None
) -> Values:
    specs = with_rank(manifest, task.rank).slices
    delta = replay(task, specs, cut(values, specs), report, reference)
    return delta | {name: report[name] for name in shapes(exact_heads(task, manifest.slices))}


def read_line(task: Task, data: bytes) -> tuple[float, float] | None:
    """Slope and curvature along the server's last step, of a change that :func:`check_delta` has let through.

    None if the task did not ask for them, or its device, of an earlier release, did not measure them.
    """
    return without_line(data)[1] if measures_line(task) else None
