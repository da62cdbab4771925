"""One pass over a device's rows, for a head that is solved in closed form: :func:`gather_sums`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.data.examples import group_by_length
from edge_runtime.errors import PackageError
from edge_runtime.package.slices import Values
from edge_runtime.training.feature_sums import SumsBuilder, form_of
from edge_runtime.training.loop import Trained
from edge_runtime.training.progress import Keeper, Progress
from edge_runtime.training.projection import Projection
from edge_runtime.training.step import LocalWork, finite

log = logging.getLogger(__name__)


def gather_sums(
    work: LocalWork,
    values: Values,
    stepped: Callable[[], None] = lambda: None,
    keeper: Keeper | None = None,
    entered: Callable[[Sequence[int]], None] = lambda _: None,
) -> Trained:
    """Add up the features of all rows, by the primal programs alone.

    Args:
        work: parts that the pass needs; its executor carries no tangents.
        values: values of all slices, as the task came with them.
        stepped: function called after each group of rows.
        keeper: what keeps the progress when the process is told to stop, as the sums may be large; None keeps none.
        entered: function called with the positions of each group of rows that entered the sums.

    Returns:
        The sums as the change to hand back. Groups whose features are not finite are left out and counted as skipped
        steps; the losses are those of the head that the task came with. Of no rows there are no sums.

    Raises:
        WorkerError: the process was told to stop; its progress is kept.
    """
    task, examples = work.task, work.examples
    if not examples.ids:
        return Trained({}, 0, 0, 0, 0.0)
    if examples.labels is None:
        raise PackageError("sums for a head need rows with labels")
    labels = np.asarray(examples.labels, np.int64)
    form = form_of(task, work.executor.manifest)
    builder = SumsBuilder(form.width, form.size, labels)
    projection = Projection(form.square, form.width, task.seed) if task.sums_projection else None
    applied: list[int] = []
    first, loss_sum = 0, 0.0
    groups = group_by_length(examples.ids, work.choice.micro_batch)
    if keeper and (begun := keeper.before()):
        builder.restore(begun.tensors, begun.seen)
        first, applied, loss_sum = begun.number, list(begun.applied), begun.loss_sum
        for number in applied:
            entered(groups[number])
    for number, group in enumerate(groups):
        if number < first:
            continue
        if keeper and number > first:
            keeper.after_step(
                lambda: Progress(number, tuple(applied), builder.rows, loss_sum, builder.state()),  # noqa: B023
                from_time_to_time=False,
            )
        sweep = work.executor.sweep(values, [examples.batch(group)], rows=[group])
        stepped()
        if not finite(sweep) or sweep.features is None:
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, number)
            continue
        features = sweep.features if projection is None else projection.of(sweep.features)
        builder.add(features, labels[group])
        entered(group)
        applied.append(number)
        loss_sum += float(sweep.loss.sum(dtype=np.float64))
    if not applied:
        raise PackageError("no row of this device gives finite features; check package and data")
    skipped = len(groups) - len(applied)
    return Trained(builder.encoded(task.sums_dtype), builder.rows, len(applied), skipped, loss_sum)
