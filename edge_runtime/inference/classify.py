"""Labels with probabilities: a softmax over the logits of a text."""

from __future__ import annotations

import numpy as np

from edge_runtime.data.batches import Batch, make_batch
from edge_runtime.execution.class_logits import class_logits
from edge_runtime.execution.executor import Executor
from edge_runtime.package.slices import Values


def classify(
    executor: Executor, values: Values, token_ids: list[int], sequence_limit: int
) -> tuple[str, dict[str, float]]:
    """The most probable label of a text, and the probability of each.

    Args:
        executor: primal programs.
        values: values of all slices, by flat name.
        token_ids: token ids of the text, at least one.
        sequence_limit: largest number of tokens of a text.

    Returns:
        The label, the first of equals; and probabilities by label, which sum to 1.
    """
    manifest = executor.manifest
    padded = make_batch(
        [token_ids], [0], pad_token_id=manifest.pad_token_id, sequence_limit=sequence_limit
    )  # the label is of no use here: the head gives its loss beside the logits
    logits = class_logits(
        executor.sweep(values, [Batch(padded.input_ids, padded.attention_mask, padded.labels)])
    )
    scores = logits[0].astype(np.float64)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    probabilities = dict(zip(manifest.labels, shares.tolist(), strict=True))
    return manifest.labels[int(scores.argmax())], probabilities
