"""One pass over a device's rows, for a head that is solved in closed form: :func:`gather_sums`."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from edge_runtime.data.examples import group_by_length
from edge_runtime.errors import PackageError
from edge_runtime.package.slices import Values
from edge_runtime.training.feature_sums import SumsBuilder, head_width
from edge_runtime.training.loop import Trained
from edge_runtime.training.progress import Keeper, Progress
from edge_runtime.training.step import LocalWork, finite

log = logging.getLogger(__name__)


def gather_sums(
    work: LocalWork,
    values: Values,
    stepped: Callable[[], None] = lambda: None,
    keeper: Keeper | None = None,
) -> Trained:
    """Add up the features of all rows, by the primal programs alone.

    Args:
        work: parts that the pass needs; its executor carries no tangents.
        values: values of all slices, as the task came with them.
        stepped: function called after each group of rows.
        keeper: what keeps the progress when the process is told to stop, as the sums may be large; None keeps none.

    Returns:
        The sums as the change to hand back. Groups whose features are not finite are left out and counted as skipped
        steps; the losses are those of the head that the task came with.

    Raises:
        WorkerError: the process was told to stop; its progress is kept.
    """
    task, examples = work.task, work.examples
    if examples.labels is None:
        raise PackageError("sums for a head need rows with labels")
    labels = np.asarray(examples.labels, np.int64)
    builder = SumsBuilder(*head_width(work.executor.manifest), labels)
    applied: list[int] = []
    first, loss_sum = 0, 0.0
    if keeper and (begun := keeper.before()):
        builder.restore(begun.tensors, begun.seen)
        first, applied, loss_sum = begun.number, list(begun.applied), begun.loss_sum
    groups = group_by_length(examples.ids, work.choice.micro_batch)
    for number, group in enumerate(groups):
        if number < first:
            continue
        if keeper and number > first:
            keeper.after_step(
                lambda: Progress(number, tuple(applied), builder.rows, loss_sum, builder.state()),  # noqa: B023
                from_time_to_time=False,
            )
        sweep = work.executor.sweep(values, [examples.batch(group)])
        stepped()
        if not finite(sweep) or sweep.features is None:
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, number)
            continue
        builder.add(sweep.features, labels[group])
        applied.append(number)
        loss_sum += float(sweep.loss.sum(dtype=np.float64))
    if not applied:
        raise PackageError("no row of this device gives finite features; check package and data")
    skipped = len(groups) - len(applied)
    return Trained(builder.encoded(task.sums_dtype), builder.rows, len(applied), skipped, loss_sum)
