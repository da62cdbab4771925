"""Tokenised examples of one length, and how a batch is grouped into such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.data.batches import Batch, make_batch, padded_length


@dataclass(frozen=True)
class Examples:
    """A device's rows as token ids and label indices, row by row; ``labels`` None for language modelling.

    ``pad_token_id`` fills batches, to lengths up to ``sequence_limit``.
    """

    ids: Sequence[Sequence[int]]
    labels: Sequence[int] | None
    pad_token_id: int
    sequence_limit: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row, as a batch holds it."""
        return padded_length(max(map(len, self.ids)), self.sequence_limit)

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, padded to the longest of them."""
        return make_batch(
            [self.ids[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
            pad_token_id=self.pad_token_id,
            sequence_limit=self.sequence_limit,
        )


def group_by_length(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Positions in groups of ``size``, like lengths together, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda position: (len(ids[position]), position))
    return [order[start : start + size] for start in range(0, len(order), size)]
