"""Evaluation of values on rows: accuracy and mean loss, by the primal programs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.data.batches import Batch
from edge_runtime.data.examples import Examples, group_by_length
from edge_runtime.execution.class_logits import class_logits
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.package.slices import Values


@dataclass(frozen=True)
class Scores:
    """Sums over all predictions: one a row for classification, one a token for language modelling.

    Attributes:
        correct: number of correct predictions.
        predicted: number of predictions.
        loss_sum: sum of their cross-entropies.
    """

    correct: int
    predicted: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return self.correct / self.predicted

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy of the predictions."""
        return self.loss_sum / self.predicted


def score(
    executor: Executor,
    values: Values,
    examples: Examples,
    micro_batch: int,
    after_group: Callable[[], None] = lambda: None,
) -> Scores:
    """Run all examples, those of like length together.

    Args:
        executor: programs loaded without trained slices.
        values: values of all slices, by flat name.
        examples: all rows, tokenised.
        micro_batch: number of examples that run at a time.
        after_group: function called after each such group.

    Raises:
        PackageError: the package's head gives nothing that tells right predictions from wrong ones.
    """
    correct, predicted, loss_sum = 0, 0, 0.0
    for group in group_by_length(examples.ids, micro_batch):
        batch = examples.batch(group)
        sweep = executor.sweep(values, [batch], rows=[group])
        after_group()
        correct += _correct(sweep, batch)
        predicted += int(batch.predicted.sum())
        loss_sum += float((sweep.loss.astype(np.float64) * batch.predicted).sum())
    return Scores(correct, predicted, loss_sum)


def _correct(sweep: Sweep, batch: Batch) -> int:
    """Number of correct predictions of a batch."""
    if sweep.correct is not None:
        return int(sweep.correct.sum())
    return int((class_logits(sweep).argmax(axis=1) == batch.labels).sum())
