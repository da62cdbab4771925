"""A head over the pooled outputs of several blocks, computed beside the programs.

:mod:`edge_runtime.package.block_head` says what such a head reads. With a block's pooled output p (H numbers, root mean
square r) its features are f = p / r. The logits are W f + b over all blocks' features, and the loss is the
cross-entropy. Its gradient in p is

    (g - f (g·f) / H) / r,        g = the block's part of Wᵀ residual,

which serves both ways: its product with a tangent of p is the directional derivative, and spread over the tokens it is
the cotangent that enters a backward sweep behind the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.engines.engine import Array
from edge_runtime.execution.flow import BAR, DOT, HIDDEN, LABELS, MASK, Flow
from edge_runtime.package.manifest import Features, Manifest
from edge_runtime.package.slices import FloatArray, Values, key

#: Suffix of the positions of the tokens that gave a block's pooled output, where the largest value is taken.
PLACES = "_places"


class PooledHead:
    """The head of a manifest that has ``head_blocks``.

    Args:
        manifest: the package's manifest, as a run sees it.
        blocks: blocks to read instead of those that the manifest names; empty for those.

    Attributes:
        kept: names of the values that must reach the head through all segments.
    """

    def __init__(self, manifest: Manifest, blocks: Sequence[int] = ()) -> None:
        self._blocks = tuple(blocks) or manifest.head_blocks or ()
        self._pooling = manifest.head_features
        self._head = manifest.head.name if manifest.head is not None else "head"
        made = [_pooled(block) for block in self._blocks]
        self.kept = frozenset({MASK, LABELS, *(n + s for n in made for s in ("", DOT, BAR, PLACES))})

    def tap(self, block: int, flow: Flow) -> None:
        """Pool what a block gave, and its tangent if it gave one.

        Args:
            block: number of the block that has just run.
            flow: values of a micro-batch; ``pooled_N`` (b, H) is added, and ``pooled_N_dot`` (K, b, H) if any.
        """
        if block not in self._blocks:
            return
        name, hidden, mask = _pooled(block), flow[HIDDEN], flow[MASK]
        if self._pooling == "max":
            flow[name + PLACES] = np.where(mask[:, :, None] > 0, hidden, -np.inf).argmax(axis=1)
            flow[name] = _taken(hidden, flow[name + PLACES])
        else:
            flow[name] = _weighted(hidden, mask, self._pooling)
        if HIDDEN + DOT in flow:
            tangent = flow[HIDDEN + DOT]
            if self._pooling == "max":
                flow[name + DOT] = np.stack([_taken(draw, flow[name + PLACES]) for draw in tangent])
            else:
                flow[name + DOT] = _weighted(tangent, mask, self._pooling)

    def read(self, flow: Flow) -> FloatArray:
        """Features (b, F) of a micro-batch that went through all blocks: each block's scaled to root mean square 1."""
        return np.concatenate([_normalised(flow[_pooled(block)]) for block in self._blocks], axis=1)

    def classify(self, flow: Flow, values: Values) -> None:
        """Add ``loss`` (b,), ``logits`` (b, C), ``residual`` (b, C), ``features`` (b, F), ``loss_dot`` (K, b) if any.

        Args:
            flow: values of a micro-batch that went through all blocks.
            values: values of all slices, the head's among them.
        """
        features = self.read(flow)
        logits = features @ values[key(self._head, "weight")].T + values[key(self._head, "bias")]
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        examples = np.arange(len(logits))
        residual = np.exp(log_probabilities)
        residual[examples, flow[LABELS]] -= 1
        loss: FloatArray = -log_probabilities[examples, flow[LABELS]]
        flow["loss"] = loss
        flow |= {"logits": logits, "residual": residual, "features": features}
        moving = [block for block in self._blocks if _pooled(block) + DOT in flow]
        if moving:
            gradients = self._gradients(flow, values)
            # Early blocks may have been run for the first few draws alone: of the others they have no tangent.
            moved = np.zeros(
                (max(len(flow[_pooled(block) + DOT]) for block in moving), len(loss)), np.float32
            )
            for block in moving:
                tangent = flow[_pooled(block) + DOT]
                moved[: len(tangent)] += (tangent * gradients[block]).sum(axis=-1)
            flow["loss" + DOT] = moved

    def add_cotangents(self, flow: Flow, values: Values, slope: FloatArray | None) -> None:
        """Add each block's cotangent, ``pooled_N_bar`` (b, H), for a backward sweep; after :meth:`classify`.

        Args:
            flow: values of a micro-batch.
            values: values of all slices, the head's among them.
            slope: factor (b,) of each example's loss; None for 1.
        """
        for block, gradient in self._gradients(flow, values).items():
            flow[_pooled(block) + BAR] = gradient if slope is None else gradient * slope[:, None]

    def enter(self, block: int, flow: Flow) -> None:
        """Add what the head reads of a block to the cotangent of that block's output, ``hidden_bar`` (b, T, H)."""
        if block not in self._blocks:
            return
        name, mask = _pooled(block), flow[MASK]
        bar = flow.pop(name + BAR)
        if self._pooling == "max":
            spread = np.zeros((*mask.shape, bar.shape[1]), np.float32)
            np.put_along_axis(spread, flow[name + PLACES][:, None], bar[:, None], axis=1)
        else:
            spread = token_weights(mask, self._pooling)[:, :, None] * bar[:, None]
        behind = flow.get(HIDDEN + BAR)
        flow[HIDDEN + BAR] = spread if behind is None else behind + spread

    def _gradients(self, flow: Flow, values: Values) -> dict[int, FloatArray]:
        """Gradient of each example's loss in each block's pooled output, (b, H) by block."""
        gradient = flow["residual"] @ values[key(self._head, "weight")]
        size = gradient.shape[1] // len(self._blocks)
        gradients: dict[int, FloatArray] = {}
        for number, block in enumerate(self._blocks):
            part = slice(number * size, (number + 1) * size)
            g, f = gradient[:, part], flow["features"][:, part]
            scale = _root_mean_square(flow[_pooled(block)])
            along = f * (g * f).mean(axis=1, keepdims=True)
            gradients[block] = (g - along) / np.where(scale > 0, scale, np.float32(np.inf))
        return gradients


def token_weights(mask: Array, pooling: Features) -> FloatArray:
    """Weight (b, T) of each token in a linear pooling of hidden states; padding stands on the right."""
    if pooling == "mean":
        shares: FloatArray = (mask / mask.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares
    weights = np.zeros(mask.shape, np.float32)
    weights[np.arange(len(mask)), 0 if pooling == "first" else mask.sum(axis=1) - 1] = 1
    return weights


def _pooled(block: int) -> str:
    return f"pooled_{block}"


def _root_mean_square(pooled: FloatArray) -> FloatArray:
    root: FloatArray = np.sqrt((pooled * pooled).mean(axis=-1, keepdims=True))
    return root


def _normalised(pooled: FloatArray) -> FloatArray:
    """Vectors (b, H) scaled to root mean square 1; zeros stay zeros."""
    scale: FloatArray = np.maximum(_root_mean_square(pooled), np.float32(1e-30))
    return pooled / scale


def _weighted(hidden: FloatArray, mask: Array, pooling: Features) -> FloatArray:
    """Weighted sum over tokens, (…, b, H), of hidden states or tangents (…, b, T, H)."""
    weighted: FloatArray = np.matmul(token_weights(mask, pooling)[:, None, :], hidden)[..., 0, :]
    return weighted


def _taken(hidden: FloatArray, places: Array) -> FloatArray:
    """The values (b, H) that hidden states (b, T, H) have at each feature's position (b, H)."""
    taken: FloatArray = np.take_along_axis(hidden, places[:, None], axis=1)[:, 0]
    return taken
