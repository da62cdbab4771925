"""Labels with probabilities: a softmax over the logits of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.batches import Batch, make_batch
from edge_runtime.execution.class_logits import class_logits
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.package.slices import Values


def classify(
    executor: Executor,
    values: Values,
    token_ids: list[int],
    sequence_limit: int,
    exits: Sequence[int] = (),
    confidence: float = 1.0,
) -> tuple[str, dict[str, float], int]:
    """The most probable label of a text, and the probability of each.

    Args:
        executor: primal programs.
        values: values of all slices, by flat name.
        token_ids: token ids of the text, at least one.
        sequence_limit: largest number of tokens of a text.
        exits: blocks behind which the text may leave the model, ascending; empty runs it through.
        confidence: least probability of a label at which the text leaves before the last exit.

    Returns:
        The label, the first of equals; probabilities by label, which sum to 1; and the block behind which the text left
        the model, 0 without exits.
    """
    manifest = executor.manifest
    padded = make_batch(
        [token_ids], [0], pad_token_id=manifest.pad_token_id, sequence_limit=sequence_limit
    )  # the label is of no use here: the head gives its loss beside the logits
    batch = Batch(padded.input_ids, padded.attention_mask, padded.labels)
    block = 0
    if exits:
        sweep, block = executor.sweep_until(
            values, batch, exits, lambda found: bool(_shares(found).max() >= confidence)
        )
    else:
        sweep = executor.sweep(values, [batch])
    shares = _shares(sweep)
    probabilities = dict(zip(manifest.labels, shares.tolist(), strict=True))
    return manifest.labels[int(shares.argmax())], probabilities, block


def _shares(sweep: Sweep) -> NDArray[np.float64]:
    """Probability of each label of a sweep's only text."""
    scores = class_logits(sweep)[0].astype(np.float64)
    raised: NDArray[np.float64] = np.exp(scores - scores.max())
    raised /= raised.sum()
    return raised
