"""A tokenizer's files beside the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ModelError
from export.model.tokenizer_files import check_tokenizer_files
from export.model.weight_files import StoredTensor

WORDS = {"a": 0, "b": 1, "c": 2}
UNIGRAM = [["a", -1.0], ["b", -2.0], ["c", -3.0]]


def write(folder: Path, vocab: object = WORDS, **settings: Any) -> Path:
    """A tokenizer.json of three words, and a tokenizer_config.json."""
    content = {"model": {"vocab": vocab}, "added_tokens": settings.pop("added_tokens", [])}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rows(count: int, name: str = "model.embed_tokens.weight") -> dict[str, StoredTensor]:
    return {name: StoredTensor(Path("model.safetensors"), "F32", (count, 4))}


@pytest.mark.parametrize("vocab", [WORDS, UNIGRAM], ids=["words", "unigram"])
def test_a_vocabulary_is_compared_with_the_embedding(tmp_path: Path, vocab: object) -> None:
    """As many rows as tokens, or more, are fine; one row less names the token that lacks one."""
    folder = write(tmp_path, vocab)
    for count in (3, 8):
        assert check_tokenizer_files(folder, {"vocab_size": count}, rows(count)) == ()
    with pytest.raises(
        ModelError, match=r"has 1 tokens that the embedding of 2 rows has no row for.*c \(2\)"
    ):
        check_tokenizer_files(folder, {"vocab_size": 2}, rows(2))


@pytest.mark.parametrize(
    "name", ["bert.embeddings.word_embeddings.weight", "wte.weight", "gpt_neox.embed_in.weight"]
)
def test_rows_are_those_of_the_weights(tmp_path: Path, name: str) -> None:
    """The embedding is found by its name, and vocab_size must be its number of rows."""
    with pytest.raises(ModelError, match=r"vocab_size 3, and .* has 5 rows; set vocab_size to 5"):
        check_tokenizer_files(write(tmp_path), {"vocab_size": 3}, rows(5, name))


def test_without_weights_the_configuration_tells_the_rows(tmp_path: Path) -> None:
    """Pickled weights can only be read by torch: then vocab_size alone is compared."""
    with pytest.raises(ModelError, match="embedding of 2 rows"):
        check_tokenizer_files(write(tmp_path), {"vocab_size": 2}, {})


@pytest.mark.parametrize("vocab", [None, {"a": "0"}, "abc"])
def test_a_tokenizer_without_vocabulary_is_refused(tmp_path: Path, vocab: object) -> None:
    """A vocabulary must map tokens to ids."""
    with pytest.raises(ModelError, match="has no vocabulary from tokens to ids"):
        check_tokenizer_files(write(tmp_path, vocab), {}, {})


@pytest.mark.parametrize("added", [[{"content": "x"}], [{"id": 4}], ["x"], {"x": 4}])
def test_added_tokens_need_content_and_id(tmp_path: Path, added: object) -> None:
    """A torn list of added tokens is refused."""
    with pytest.raises(ModelError, match="added_tokens without content and id"):
        check_tokenizer_files(write(tmp_path, added_tokens=added), {}, {})


def test_an_added_token_of_the_vocabulary_keeps_its_id(tmp_path: Path) -> None:
    """A token that stands in the vocabulary with one id and among the added ones with another is refused."""
    folder = write(tmp_path, added_tokens=[{"content": "b", "id": 1}])
    assert check_tokenizer_files(folder, {"vocab_size": 3}, {}) == ()
    folder = write(tmp_path, added_tokens=[{"content": "b", "id": 3}])
    with pytest.raises(ModelError, match="gives b the id 1 in its vocabulary and 3 among its added tokens"):
        check_tokenizer_files(folder, {"vocab_size": 9}, {})


def test_several_ends_are_no_contradiction(tmp_path: Path) -> None:
    """config.json may list several ends of text: it is enough that the tokenizer's is among them."""
    folder = write(tmp_path, eos_token={"content": "c"})
    assert check_tokenizer_files(folder, {"vocab_size": 3, "eos_token_id": [1, 2]}, {}) == ()
    (note,) = check_tokenizer_files(folder, {"vocab_size": 3, "eos_token_id": [0, 1]}, {})
    assert note.startswith("eos_token_id of config.json is [0, 1], the tokenizer's c is 2")


def test_a_folder_without_tokenizer_json_says_nothing_here(tmp_path: Path) -> None:
    """Other vocabularies are read by transformers, later."""
    assert check_tokenizer_files(tmp_path, {"vocab_size": 3}, rows(3)) == ()
