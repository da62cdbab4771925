"""The next token, drawn from its logits.

Logits are divided by the temperature; then only the ``top_k`` most probable tokens stay, and of these the most probable
ones whose probabilities sum to at least ``top_p`` (Holtzman et al., ICLR 2020, "The curious case of neural text
degeneration", section 3.1). Equal logits count in the order of token ids. Draws come from raw Philox words, so the same
seed and the same logits give the same tokens everywhere.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.inference.requests import Sampling
from edge_runtime.package.slices import FloatArray


class Sampler:
    """Draws the tokens of one text.

    Args:
        sampling: how tokens are drawn.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._bits = np.random.Philox(key=sampling.seed)

    def next_token(self, logits: FloatArray) -> int:
        """The id of the next token, given its logits (V,)."""
        chosen = self._sampling
        if chosen.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if chosen.top_k:
            order = order[: chosen.top_k]
        scores = logits[order].astype(np.float64) / chosen.temperature
        shares = np.exp(scores - scores[0])
        sums = np.cumsum(shares / shares.sum())
        kept = int(np.searchsorted(sums, chosen.top_p)) + 1 if chosen.top_p < 1 else len(order)
        kept = min(kept, len(order))
        drawn = float(self._bits.random_raw() >> np.uint64(11)) * 2.0**-53 * sums[kept - 1]
        return int(order[min(int(np.searchsorted(sums[:kept], drawn, side="right")), kept - 1)])
