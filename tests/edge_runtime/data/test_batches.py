from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data.batches import PAD_TO, Tokenizer, draw_batches, make_batch, padded_length
from edge_runtime.data.rows import Row
from edge_runtime.errors import DataError, PackageError

# draw_batches(8, seed=7, round_number=1, slot=0, steps=2, batch_size=4), numpy 2
RECORDED_DRAW = [[7, 5, 4, 2], [0, 6, 3, 1]]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A tokenizer over three letters, which drops all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"a": 1, "b": 2, "c": 3}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_the_tokenizer_truncates_and_never_pads(tokenizer_path) -> None:
    """Rows keep their own length, up to the limit."""
    tokenizer = Tokenizer(tokenizer_path, sequence_limit=2)
    assert tokenizer.encode([Row("a", 1), Row("abc", 0)]) == [[1], [1, 2]]


def test_a_row_without_tokens_is_named_by_line(tokenizer_path) -> None:
    """A text that the tokenizer turns into nothing cannot be trained on."""
    with pytest.raises(DataError, match="row 2") as caught:
        Tokenizer(tokenizer_path, sequence_limit=4).encode([Row("a", 1), Row("xyz", 1)])
    assert "xyz" not in str(caught.value)


def test_a_malformed_tokenizer_is_a_package_error(tmp_path) -> None:
    """A tokenizer file that cannot be read is the package's fault, and named."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json", sequence_limit=4)


def test_a_batch_is_padded_to_its_longest_row() -> None:
    """Padding goes right, with the package's token, and is masked."""
    batch = make_batch([[5], [6, 7, 8]], [1, 0], pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 9, 9], [6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == np.int64


@given(tokens=st.integers(1, 600), limit=st.integers(1, 512))
def test_padding_goes_to_a_multiple_within_the_limit(tokens: int, limit: int) -> None:
    """A batch is padded to the next multiple of eight, never past the limit, never below its longest row."""
    length = padded_length(tokens, limit)
    assert tokens <= length < tokens + PAD_TO
    assert length <= max(limit, tokens)
    assert length % PAD_TO == 0 or length in (limit, tokens)


def test_a_batch_within_a_limit_is_padded_to_a_multiple() -> None:
    """With a limit the width is rounded up, and what was added is masked; without one it is the longest row's."""
    ids, labels = [[5], [6] * 11], [1, 0]
    assert make_batch(ids, labels, pad_token_id=9).input_ids.shape == (2, 11)
    batch = make_batch(ids, labels, pad_token_id=9, sequence_limit=32)
    assert batch.input_ids.shape == (2, 16)
    assert batch.attention_mask.sum(axis=1).tolist() == [1, 11]
    assert make_batch(ids, labels, pad_token_id=9, sequence_limit=12).input_ids.shape == (2, 12)


@pytest.mark.parametrize(("ids", "labels"), [([], []), ([[1]], [])])
def test_a_batch_needs_rows_and_labels(ids, labels) -> None:
    """A group without rows, or without a label a row, is a caller's mistake."""
    with pytest.raises(ValueError, match="batch"):
        make_batch(ids, labels, pad_token_id=0)


@given(
    rows=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 20), seed=st.integers(0, 2**63 - 1)
)
def test_batches_are_full_and_use_rows_evenly(rows: int, size: int, steps: int, seed: int) -> None:
    """Every batch is full (or all rows, if those are fewer), and no row is used twice more than another."""
    batches = draw_batches(rows, seed=seed, round_number=3, slot=1, steps=steps, batch_size=size)
    assert [len(batch) for batch in batches] == [min(size, rows)] * steps
    uses = np.bincount(np.concatenate(batches), minlength=rows)
    assert uses.max() - uses.min() <= 1
    assert len(uses) == rows


def test_draws_are_keyed_by_seed_round_and_slot() -> None:
    """The same key draws the same rows; any other key draws others."""

    def draw(seed: int = 1, round_number: int = 2, slot: int = 3) -> list[list[int]]:
        batches = draw_batches(100, seed=seed, round_number=round_number, slot=slot, steps=2, batch_size=10)
        return [batch.tolist() for batch in batches]

    assert draw() == draw()
    assert draw(seed=4) != draw() != draw(round_number=4)
    assert draw(slot=4) != draw()


def test_the_first_draw_is_the_recorded_one() -> None:
    """Row order is part of a run's reproducibility: it may not change with a version of numpy."""
    batches = draw_batches(8, seed=7, round_number=1, slot=0, steps=2, batch_size=4)
    assert [batch.tolist() for batch in batches] == RECORDED_DRAW


def test_no_rows_is_a_callers_mistake() -> None:
    """Without rows there is nothing to draw from."""
    with pytest.raises(ValueError, match="rows"):
        draw_batches(0, seed=1, round_number=0, slot=0, steps=1, batch_size=1)


def test_a_tokenizer_that_gives_up_is_the_packages_fault(tmp_path) -> None:
    """A vocabulary without an unknown token is a PackageError that does not quote the text."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import models

    Raw(models.WordLevel({"fine": 1})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PackageError, match="unknown token") as caught:
        Tokenizer(tmp_path / "tokenizer.json", sequence_limit=4).encode([Row("confidential", 1)])
    assert caught.value.__cause__ is None
