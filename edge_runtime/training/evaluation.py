"""How well values do on rows: accuracy and mean loss, by the primal programs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.data.batches import Batch
from edge_runtime.data.examples import Examples, group_by_length
from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.package.slices import Values


@dataclass(frozen=True)
class Scores:
    """Sums over what was predicted: rows for classification, tokens for language modelling."""

    correct: int
    predicted: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        """The share predicted right."""
        return self.correct / self.predicted

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy."""
        return self.loss_sum / self.predicted


def score(
    executor: Executor,
    values: Values,
    examples: Examples,
    micro_batch: int,
    after_group: Callable[[], None] = lambda: None,
) -> Scores:
    """Run all examples, like lengths together.

    Args:
        executor: without trained slices.
        values: of all slices.
        examples: all rows.
        micro_batch: how many run at a time.
        after_group: called after each of these groups.

    Raises:
        PackageError: the package's head does not give what tells right from wrong.
    """
    correct, predicted, loss_sum = 0, 0, 0.0
    for group in group_by_length(examples.ids, micro_batch):
        batch = examples.batch(group)
        sweep = executor.sweep(values, [batch])
        after_group()
        correct += _correct(sweep, batch)
        predicted += int(batch.predicted.sum())
        loss_sum += float((sweep.loss.astype(np.float64) * batch.predicted).sum())
    return Scores(correct, predicted, loss_sum)


def _correct(sweep: Sweep, batch: Batch) -> int:
    """How many labels of a batch were predicted right."""
    if sweep.correct is not None:
        return int(sweep.correct.sum())
    if sweep.logits is None:
        raise PackageError("the package's head gives neither logits nor a count of right tokens")
    return int((sweep.logits.argmax(axis=1) == batch.labels).sum())
