"""The texts of a check."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.packaging.self_check import CHECK_ROW_TOKENS, CHECK_ROWS, CHECK_TOKENS, draw_batch


@pytest.mark.parametrize(("labels", "words"), [(3, 4), (3, 2000), (0, 2000), (0, 60), (3, 126)])
def test_a_check_is_bounded_whatever_the_texts(tiny_model: Path, labels: int, words: int) -> None:
    """However many texts there are, and however long, rows, tokens of a row and tokens in all keep to their bounds."""
    texts = ("good " * words,) * 40
    batch = draw_batch(
        tiny_model / "tokenizer.json", texts, labels=labels, sequence_limit=4096, pad_token_id=0
    )
    lengths = batch.attention_mask.sum(axis=1)
    assert 1 <= len(lengths) <= CHECK_ROWS
    assert lengths.max() == min(words + 2, CHECK_ROW_TOKENS)  # the tokenizer adds one before and one after
    assert lengths.sum() <= CHECK_TOKENS
    assert len(lengths) == min(CHECK_ROWS, CHECK_TOKENS // int(lengths.max()))


def test_a_shorter_package_has_shorter_rows(tiny_model: Path) -> None:
    """The sequence limit of the package holds for the check too."""
    batch = draw_batch(
        tiny_model / "tokenizer.json", ("good " * 99,), labels=3, sequence_limit=7, pad_token_id=0
    )
    assert batch.input_ids.shape == (1, 7)
