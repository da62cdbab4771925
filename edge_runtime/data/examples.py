"""Tokenised examples, and how they are grouped so that a batch needs little padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.data.batches import Batch, make_batch, padded_length


@dataclass(frozen=True)
class Examples:
    """A device's rows as token ids.

    Attributes:
        ids: token ids of each row.
        labels: label index of each row; None for language modelling.
        pad_token_id: token id of the padding.
        sequence_limit: largest length of a batch, in tokens.
    """

    ids: Sequence[Sequence[int]]
    labels: Sequence[int] | None
    pad_token_id: int
    sequence_limit: int

    @property
    def longest(self) -> int:
        """Length of the longest row, in tokens, as padded in a batch; that of one token if there is no row."""
        return padded_length(max(map(len, self.ids), default=1), self.sequence_limit)

    def batch(self, rows: Sequence[int]) -> Batch:
        """A batch of these rows, padded to the longest of them."""
        return make_batch(
            [self.ids[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
            pad_token_id=self.pad_token_id,
            sequence_limit=self.sequence_limit,
        )


def group_by_length(ids: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Positions in groups of ``size`` that bring rows of like length together, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda position: (len(ids[position]), position))
    return [order[start : start + size] for start in range(0, len(order), size)]
