import json

import pytest

from benchmarks.harness.long_rows import LABELS, write_full_rows


@pytest.fixture
def tokenizer(tiny_model):
    return tiny_model / "tokenizer.json"


def test_every_row_fills_the_sequence_and_has_a_known_label(tmp_path, tokenizer) -> None:
    """Rows hold at least as many tokens as asked for, labels of the set, and several different ones."""
    from tokenizers import Tokenizer

    path = tmp_path / "rows.jsonl"
    write_full_rows(path, tokenizer, tokens=32, count=12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counter = Tokenizer.from_file(str(tokenizer))
    counter.no_truncation()
    assert len(rows) == 12
    assert all(len(counter.encode(row["text"]).ids) >= 32 for row in rows)
    assert {row["label"] for row in rows} <= set(json.loads(LABELS.read_text()))
    assert len({row["label"] for row in rows}) > 6


def test_the_rows_are_the_same_every_time(tmp_path, tokenizer) -> None:
    """Two calls write the same bytes, so that repeated benchmarks measure the same text."""
    write_full_rows(tmp_path / "one", tokenizer, tokens=16, count=4)
    write_full_rows(tmp_path / "two", tokenizer, tokens=16, count=4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
