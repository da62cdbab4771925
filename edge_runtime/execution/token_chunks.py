"""The output layer of a language model, computed some tokens at a time.

The layer treats every token alike, and its logits, tokens times vocabulary, would be the largest tensor of a step. An
example's loss is the mean over its predicted tokens. The mean over all chunks is that of the chunks' means, each
weighted by the number of tokens it predicts. Jvps and cotangents are linear in the losses and are weighted likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_runtime.data.batches import NOT_PREDICTED
from edge_runtime.engines.engine import Array

#: Number of the token axis of each input and output that has one.
TOKEN_AXIS = {"hidden": 1, "hidden_dot": 2, "hidden_bar": 1, "labels": 1}


def run_in_chunks(
    run: Callable[[Mapping[str, Array]], dict[str, Array]], inputs: Mapping[str, Array], tokens: int
) -> dict[str, Array]:
    """Outputs of an output layer for a micro-batch, computed ``tokens`` tokens at a time.

    Args:
        run: function that runs the program on inputs by name.
        inputs: ``hidden`` (B, T, H), ``labels`` (B, T), weights and, for a dual program, ``hidden_dot`` (K, B, T, H).
        tokens: number of tokens of a chunk, at least one.

    Returns:
        ``loss`` (B,), ``correct`` (B,), and where the program gives them ``loss_dot`` (K, B), ``hidden_bar`` (B, T, H).
    """
    labels = inputs["labels"]
    total = np.count_nonzero(labels != NOT_PREDICTED, axis=1)
    outputs: dict[str, Array] = {}
    for start in range(0, labels.shape[1], tokens):
        part = slice(start, start + tokens)
        counts = np.count_nonzero(labels[:, part] != NOT_PREDICTED, axis=1)
        if not counts.any():
            continue
        given = run({name: _part(name, array, part) for name, array in inputs.items()})
        _add(outputs, given, counts, (counts / total).astype(np.float32), part, inputs["hidden"])
    return outputs


def _part(name: str, array: Array, part: slice) -> Array:
    axis = TOKEN_AXIS.get(name)
    return array if axis is None else np.ascontiguousarray(array[(slice(None),) * axis + (part,)])


def _add(
    outputs: dict[str, Array],
    given: dict[str, Array],
    counts: Array,
    share: Array,
    part: slice,
    hidden: Array,
) -> None:
    """Add the outputs of one chunk.

    An example of which the chunk predicts no token gets nothing, whatever the program gave for it.
    """
    counted = counts > 0
    for name, value in given.items():
        if name == "hidden_bar":
            bar = outputs.setdefault(name, np.zeros_like(hidden))
            bar[:, part] = np.where(counted[:, None, None], value, 0) * share[:, None, None]
        elif name == "correct":
            outputs[name] = outputs.get(name, 0) + value
        else:  # loss (B,), loss_dot (K, B)
            outputs[name] = outputs.get(name, np.float32(0)) + np.where(counted, value, 0) * share
