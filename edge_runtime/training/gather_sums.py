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
from edge_runtime.training.step import LocalWork, finite

log = logging.getLogger(__name__)


def gather_sums(work: LocalWork, values: Values, stepped: Callable[[], None] = lambda: None) -> Trained:
    """Add up the features of all rows, by the primal programs alone.

    Args:
        work: parts that the pass needs; its executor carries no tangents.
        values: values of all slices, as the task came with them.
        stepped: function called after each group of rows.

    Returns:
        The sums as the change to hand back. Groups whose features are not finite are left out and counted as skipped
        steps; the losses are those of the head that the task came with.
    """
    task, examples = work.task, work.examples
    if examples.labels is None:
        raise PackageError("sums for a head need rows with labels")
    labels = np.asarray(examples.labels, np.int64)
    builder = SumsBuilder(*head_width(work.executor.manifest), labels)
    applied, skipped, loss_sum = 0, 0, 0.0
    for number, group in enumerate(group_by_length(examples.ids, work.choice.micro_batch)):
        sweep = work.executor.sweep(values, [examples.batch(group)], rows=[group])
        stepped()
        if not finite(sweep) or sweep.features is None:
            log.warning("event=step_skipped task=%s step=%d reason=not_finite", task.task_id, number)
            skipped += 1
            continue
        builder.add(sweep.features, labels[group])
        applied, loss_sum = applied + 1, loss_sum + float(sweep.loss.sum(dtype=np.float64))
    if not applied:
        raise PackageError("no row of this device gives finite features; check package and data")
    return Trained(builder.encoded(task.sums_dtype), builder.rows, applied, skipped, loss_sum)
