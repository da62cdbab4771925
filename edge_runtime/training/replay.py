"""Scalar reports: a task's change made again, bit for bit, from its directional derivatives alone.

A device whose task says ``report = "scalars"`` sends, for each applied step, the (K, b) numbers of which its estimate
was made. Here b is the number of examples of a batch, or 1 where all its examples share a direction. The directions
follow from the task (:mod:`edge_runtime.training.tangents`), so whoever has the task and the values it came with can
take the very same steps. The change of a head whose gradient is exact travels as it is; a perturbed head is replayed
like a slice.

Every operation between these numbers and the change is an elementwise IEEE one in a fixed order, so all CPUs agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, shapes
from edge_runtime.protocol.messages import PER_EXAMPLE, Task
from edge_runtime.training.gradient import estimate
from edge_runtime.training.optimizers import make_optimizer
from edge_runtime.training.sketch import sketch_of
from edge_runtime.training.step_exit import within
from edge_runtime.training.step_rank import step_rank
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.training.trainable import estimated_slices, exact_heads

#: Names in a report: float32 (S, K, b) numbers, and the float32 (S,) numbers of their steps, ascending.
SCALARS, STEPS = "scalars/jvps", "scalars/steps"


def replay(
    task: Task,
    specs: Sequence[SliceSpec],
    values: Values,
    report: Mapping[str, FloatArray],
    reference: Values | None = None,
) -> Values:
    """The change of everything whose gradient the task estimated: its slices, and a perturbed head.

    Args:
        task: task that was trained.
        specs: its slices and, if the task trained it, the head; others are passed over.
        values: values of all slices, as the task came with them.
        report: the device's report, checked by :func:`decode_report`.
        reference: values of the task's ``reference``; None if it has none.

    Raises:
        SliceError: the numbers are so large that the change they make is not finite.
    """
    moved = estimated_slices(task, specs)
    optimizer = make_optimizer(task.optimizer, values, list(shapes(moved)), sketch_of(task))
    if SCALARS in report:
        with np.errstate(over="ignore", invalid="ignore"):
            for number, scalars in zip(report[STEPS], report[SCALARS], strict=True):
                ranks = step_rank(task, specs, int(number))
                drawn = within(task, moved, int(number))
                drawn = drawn if ranks is None else ranks.moved(drawn)
                tangents = draw_tangents(task, drawn, int(number), range(scalars.shape[1]), reference)
                gradient = estimate(scalars, tangents)
                optimizer.step(gradient if ranks is None else ranks.whole(gradient, values))
    delta = optimizer.delta()
    for name, array in delta.items():
        if not np.isfinite(array).all():
            raise SliceError(f"the change of {name} that a report of scalars makes is not finite")
    return delta


def decode_report(data: bytes, task: Task, heads: Sequence[SliceSpec]) -> Values:
    """Parse and check a device's report.

    Args:
        data: safetensors bytes from outside.
        task: task of the report.
        heads: the head, if the task trained it; slices are passed over.

    Raises:
        SliceError: the bytes are not safetensors; a tensor is missing, unknown, of another shape or dtype, or not
            finite; there are more steps, draws or examples than the task has; or a number exceeds its ``jvp_limit``.
            Names the tensor and the limit.
    """
    try:
        report: Values = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SliceError(f"a report of scalars is not a safetensors file: {error}") from error
    wanted = shapes(exact_heads(task, heads))
    estimates = bool(task.slices) or (task.train_head and task.head == "perturbed")
    if unknown := sorted(set(report) - {*((SCALARS, STEPS) if estimates else ()), *wanted}):
        raise SliceError(f"unknown tensor {unknown[0]} in a report of scalars")
    if missing := sorted(set(wanted) - set(report)):
        raise SliceError(f"tensor {missing[0]} is missing in a report of scalars")
    for name, array in report.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise SliceError(f"tensor {name} of a report of scalars must be finite float32")
        if name in wanted and array.shape != wanted[name]:
            raise SliceError(f"tensor {name} has shape {array.shape}, expected {wanted[name]}")
    if (SCALARS in report) != (STEPS in report):
        raise SliceError(f"a report of scalars has both {SCALARS} and {STEPS}, or neither")
    if SCALARS in report:
        _check_scalars(report[SCALARS], report[STEPS], task)
    return report


def _check_scalars(scalars: FloatArray, steps: FloatArray, task: Task) -> None:
    batch = task.batch_size if task.directions in PER_EXAMPLE else 1
    if scalars.ndim != 3 or scalars.shape[1] != task.draws or not 1 <= scalars.shape[2] <= batch:
        raise SliceError(f"{SCALARS} has shape {scalars.shape}, expected (steps, {task.draws}, 1 to {batch})")
    if task.jvp_limit is not None and scalars.size and np.abs(scalars).max() > np.float32(task.jvp_limit):
        raise SliceError(f"{SCALARS} holds a number beyond the task's jvp_limit of {task.jvp_limit}")
    fits = steps.shape == (len(scalars),) and len(steps) <= task.steps
    if not fits or not _ascend(steps) or not (steps == np.floor(steps)).all():
        raise SliceError(f"{STEPS} must hold one ascending step number for each of {len(scalars)} steps")
    if len(steps) and not 0 <= steps[0] <= steps[-1] < task.steps:
        raise SliceError(f"{STEPS} names a step outside 0 to {task.steps - 1}")


def _ascend(steps: FloatArray) -> bool:
    return bool((np.diff(steps) > 0).all())
