"""From rows to batches of token ids. Only the worker loads this module, because it needs numpy and the tokenizer."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import tokenizers.decoders
from numpy.typing import NDArray

from edge_runtime.data.rows import Row, load_rows
from edge_runtime.errors import DataError, PackageError

__all__ = ["Batch", "Row", "TextStream", "Tokenizer", "draw_batches", "load_rows", "make_batch"]

IntArray = NDArray[np.int64]
PAD_TO = 8
#: Label of a place whose next token is not predicted.
NOT_PREDICTED = -1


class Tokenizer:
    """The package's tokenizer. It cuts rows off at a sequence limit and never pads."""

    def __init__(self, path: Path, sequence_limit: int) -> None:
        """Load ``tokenizer.json``.

        Args:
            path: the package's tokenizer file.
            sequence_limit: largest number of tokens of a row, special tokens included.

        Raises:
            PackageError: the file cannot be read, or cannot be used with this limit.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.enable_truncation(max_length=sequence_limit)
        except Exception as error:  # the library raises nothing narrower
            raise PackageError(
                f"cannot use the tokenizer {path} at {sequence_limit} tokens: {error}"
            ) from error
        self._tokenizer.no_padding()
        self._sequence_limit = sequence_limit

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """The text of tokens that follow a prompt, as they come."""
        return TextStream(self._tokenizer, prompt)

    def encode(self, rows: Sequence[Row], at_least: int = 1) -> list[list[int]]:
        """Token ids of each row.

        Args:
            rows: rows with the texts.
            at_least: number of tokens that each row must have; 2 for language modelling, where the first predicts the
                second.

        Raises:
            DataError: a row has fewer tokens; names the row by its number within ``rows``, from 1.
            PackageError: the tokenizer cannot encode a text.
        """
        try:
            ids = [self._tokenizer.encode(row.text).ids for row in rows]
        except Exception:  # noqa: BLE001 - the library raises nothing narrower, and may quote the text: not chained
            raise PackageError(
                "the package's tokenizer cannot encode a row; export it with an unknown token"
            ) from None
        for number, row_ids in enumerate(ids, start=1):
            if len(row_ids) < at_least:
                raise DataError(
                    f"row {number} of the data gives {len(row_ids) or 'no'} token{'s' * (len(row_ids) != 1)} "
                    f"within the limit of {self._sequence_limit}, the task needs {at_least} or more; remove it"
                )
        return ids


class TextStream:
    """The characters of a text whose tokens come one by one; special tokens have none.

    Args:
        tokenizer: the tokenizer of the library.
        prompt: tokens that go before, on which spaces may depend.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizers.decoders.DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """The characters that are known with one more token; empty where more bytes of a character must come."""
        return self._stream.step(self._tokenizer, token_id) or ""


@dataclass(frozen=True)
class Batch:
    """Padded examples.

    Attributes:
        input_ids: (B, T) int64 token ids.
        attention_mask: (B, T) int64, 1 on tokens and 0 on padding.
        labels: (B,) int64 label index of each example; for language modelling (B, T), the token that follows each
            place, with ``NOT_PREDICTED`` at the last token and on padding.
    """

    input_ids: IntArray
    attention_mask: IntArray
    labels: IntArray

    @property
    def predicted(self) -> IntArray:
        """(B,) number of labels that each example is scored on: 1 for classification, else its predicted tokens."""
        if self.labels.ndim == 1:
            return np.ones(len(self.labels), dtype=np.int64)
        counts: IntArray = (self.labels != NOT_PREDICTED).sum(axis=1)
        return counts


def make_batch(
    ids: Sequence[Sequence[int]],
    labels: Sequence[int] | None,
    *,
    pad_token_id: int,
    sequence_limit: int | None = None,
) -> Batch:
    """Pad token ids on the right, to the longest row.

    Args:
        ids: token ids of each row.
        labels: label index of each row; None for language modelling, where the labels are the next tokens.
        pad_token_id: token id of the padding.
        sequence_limit: largest length. With it the length is rounded up to a multiple of ``PAD_TO``, within the limit:
            few different lengths mean that the engine's memory blocks and a prefix cache's entries are used again. None
            does not round.

    Raises:
        ValueError: there are no rows, or not one label a row.
    """
    if not ids or (labels is not None and len(ids) != len(labels)):
        raise ValueError(
            f"{len(ids)} rows and {'no' if labels is None else len(labels)} labels do not make a batch"
        )
    width = max(len(row) for row in ids)
    if sequence_limit is not None:
        width = padded_length(width, sequence_limit)
    input_ids = np.full((len(ids), width), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    for position, row in enumerate(ids):
        input_ids[position, : len(row)] = row
        mask[position, : len(row)] = 1
    if labels is None:
        return Batch(input_ids, mask, _next_tokens(input_ids, mask))
    return Batch(input_ids, mask, np.asarray(labels, dtype=np.int64))


def _next_tokens(input_ids: IntArray, mask: IntArray) -> IntArray:
    """(B, T) token after each place; ``NOT_PREDICTED`` where padding or nothing follows."""
    labels = np.full_like(input_ids, NOT_PREDICTED)
    labels[:, :-1] = np.where(mask[:, 1:] == 1, input_ids[:, 1:], NOT_PREDICTED)
    return labels


def padded_length(tokens: int, sequence_limit: int) -> int:
    """Length to which a batch is padded if its longest row has this many tokens."""
    return min(-(-tokens // PAD_TO) * PAD_TO, max(tokens, sequence_limit))


def draw_batches(
    row_count: int, *, seed: int, round_number: int, slot: int, steps: int, batch_size: int
) -> list[IntArray]:
    """Choose the rows of each step.

    The rows are shuffled and taken in turn, and shuffled anew when all have been taken. Every batch is full; a device
    with fewer rows than ``batch_size`` takes all of them in each step. The shuffle orders rows by raw Philox words,
    which no version of numpy changes.

    Args:
        row_count: number of rows of the device.
        seed: seed of the run.
        round_number: number of the round, from 0.
        slot: number of the device within the round.
        steps: number of batches.
        batch_size: number of rows of a batch.

    Returns:
        For each step the indices of its rows. They are distinct, unless a batch spans two shuffles.
    """
    if row_count < 1:
        raise ValueError("a device without rows has no batches")
    size = min(batch_size, row_count)
    key = hashlib.sha256(struct.pack("<QQQ", seed, round_number, slot)).digest()[:16]
    bits = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    order = np.empty(0, dtype=np.int64)
    batches = []
    for _ in range(steps):
        while order.size < size:
            shuffled = np.argsort(bits.random_raw(row_count), kind="stable").astype(np.int64)
            order = np.concatenate([order, shuffled])
        batches.append(order[:size])
        order = order[size:]
    return batches
