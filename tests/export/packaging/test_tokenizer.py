"""Tokenizers whose tokens the embedding has no row for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from edge_runtime.errors import ModelError
from export.packaging.tokenizer import write_tokenizer


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rows(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def test_a_tokenizer_that_fits_is_written_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Nothing is changed where every token has a row."""
    write_tokenizer(folder, tmp_path / "tokenizer.json", rows(folder))
    expected = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    assert (tmp_path / "tokenizer.json").read_text() == expected


def test_an_added_token_without_a_row_is_ordinary_text(folder: Path, tmp_path: Path) -> None:
    """Texts that have it, or do not, give only ids that the embedding has; other texts give what they gave before."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "plotting"])
    tokenizer.save_pretrained(folder)
    write_tokenizer(folder, tmp_path / "tokenizer.json", rows(folder))
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a dull plot", "a <tool> for plotting"):
        assert max(written.encode(text).ids) < rows(folder)
    assert written.encode("a dull plot").ids == tokenizer("a dull plot")["input_ids"]
    assert max(tokenizer("a <tool>")["input_ids"]) >= rows(folder)


def test_a_padding_token_without_a_row_is_stood_in_for(folder: Path, tmp_path: Path) -> None:
    """Padding is masked: the unknown token pads instead, and a sentence says so."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    pad, note = write_tokenizer(folder, tmp_path / "tokenizer.json", rows(folder))
    assert pad == tokenizer.unk_token_id
    assert note is not None
    assert note.startswith(
        "The tokenizer has a padding token without a row in the embedding: texts are padded with"
    )


def test_a_word_without_a_row_is_refused(folder: Path, tmp_path: Path) -> None:
    """A vocabulary that is longer than the embedding belongs to another model, and no file is written."""
    with pytest.raises(
        ModelError, match=r"and the embedding has 20 rows; get the tokenizer that belongs to the"
    ):
        write_tokenizer(folder, tmp_path / "tokenizer.json", 20)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_a_token_of_every_text_without_a_row_is_refused(folder: Path, tmp_path: Path, nested: bool) -> None:
    """What the tokenizer puts into each text must have a row, within a sequence of post-processors too."""
    content = json.loads((folder / "tokenizer.json").read_text())
    number = rows(folder) + 2
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": number, "content": "<s>", **flags, "special": True}]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }
    content["post_processor"] = {"type": "Sequence", "processors": [template]} if nested else template
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"gives <s> the id {number}, and the embedding has"):
        write_tokenizer(folder, tmp_path / "tokenizer.json", rows(folder))
