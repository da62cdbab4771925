"""Whether a folder's tokenizer fits its model, told from the files alone.

Facts that several files state are compared: token ids and the rows of the embedding, special tokens, lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError
from export.model.json_file import read_json_object
from export.model.weight_files import StoredTensor, listed

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
#: Names that input embeddings have, in the families that transformers knows; the end of a tensor's name.
EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "embeddings.tok_embeddings.weight",
)
#: Tokens that a tokenizer puts into a text by itself, or stands one in for what it does not know.
IN_TEXTS = ("bos_token", "eos_token", "cls_token", "sep_token", "unk_token")
#: Tokens whose ids config.json states as well.
IN_CONFIG = ("bos", "eos", "pad")
#: A tokenizer_config.json that has no limit says something far above this.
LARGEST_LENGTH = 1 << 30


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a tokenizer.json: ids of its vocabulary, and of what was added to it."""

    vocabulary: dict[str, int]
    added: dict[str, int]

    def id_of(self, content: str) -> int | None:
        return self.added.get(content, self.vocabulary.get(content))


def check_tokenizer_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """Refuse a tokenizer whose texts the model cannot read.

    Args:
        folder: model folder.
        config: content of its config.json.
        tensors: tensors of its weight files; empty if only torch can read them.

    Returns:
        Sentences for people: what the files say differently and does not matter to training.

    Raises:
        ModelError: a token has no row in the embedding, two tokens share an id, or two files name different tokens.
    """
    rows = _rows(folder, config, tensors)
    notes = list(_length_notes(folder, config))
    path = folder / TOKENIZER
    if not path.is_file():
        return tuple(notes)
    content = read_json_object(path)
    tokens = _tokens(path, content)
    _check_ids(folder, tokens)
    if rows is not None:
        notes += _check_rows(folder, tokens, rows)
    notes += _check_special(folder, config, tokens, rows)
    return tuple(notes)


def beyond(tokens: Mapping[str, int], rows: int) -> dict[str, int]:
    """The tokens that have no row in an embedding of so many."""
    return {content: number for content, number in tokens.items() if number >= rows}


def beyond_note(tokens: Mapping[str, int], rows: int) -> str:
    """A sentence about added tokens that have no row: a text that has one is read as ordinary text."""
    named = listed(f"{content} ({number})" for content, number in tokens.items())
    return (
        f"Added tokens without a row in the embedding of {rows}: {named}. They are left out of the package's "
        f"tokenizer: texts that have them are read as ordinary text. To train them, call "
        f"model.resize_token_embeddings({max(tokens.values()) + 1}), save_pretrained, and export again"
    )


def _rows(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> int | None:
    """Rows of the input embedding, as weights and config.json agree; None if neither says."""
    stated = config.get("vocab_size")
    for name, tensor in tensors.items():
        if name.endswith(EMBEDDINGS) and len(tensor.shape) == 2:
            if isinstance(stated, int) and tensor.shape[0] != stated:
                raise ModelError(
                    f"{folder / 'config.json'} has vocab_size {stated}, and {name} has {tensor.shape[0]} rows; set "
                    f"vocab_size to {tensor.shape[0]} if the tokenizer is of the weights, or get both from one place"
                )
            return tensor.shape[0]
    return stated if isinstance(stated, int) else None


def _tokens(path: Path, content: Mapping[str, Any]) -> _Tokens:
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, the place is the id
        pairs = {str(entry[0]): number for number, entry in enumerate(vocabulary) if entry}
    elif isinstance(vocabulary, Mapping) and all(isinstance(number, int) for number in vocabulary.values()):
        pairs = dict(vocabulary)
    else:
        raise ModelError(
            f"{path} has no vocabulary from tokens to ids (model.vocab); get the tokenizer again"
        )
    whole = isinstance(added, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("content"), str) and isinstance(each.get("id"), int)
        for each in added
    )
    if not whole:
        raise ModelError(f"{path} has added_tokens without content and id; get the tokenizer again")
    return _Tokens(pairs, {each["content"]: each["id"] for each in added})


def _check_ids(folder: Path, tokens: _Tokens) -> None:
    """Refuse an added token whose id is another token's, within tokenizer.json and in tokenizer_config.json."""
    owners = {number: content for content, number in tokens.vocabulary.items()}
    for content, number in tokens.added.items():
        other = tokens.vocabulary.get(content)
        if other is not None and other != number:
            raise ModelError(
                f"{folder / TOKENIZER} gives {content} the id {other} in its vocabulary and {number} among its added "
                f"tokens; set the latter to {other}"
            )
        if other is None and number in owners:
            raise ModelError(
                f"{folder / TOKENIZER} adds {content} with the id {number}, which is {owners[number]}'s in its "
                f"vocabulary; rename {owners[number]} there to {content}, or give it another id"
            )
    for content, number in _stated_ids(folder):
        known = tokens.id_of(content)
        if known is not None and known != number:
            raise ModelError(
                f"{content} has the id {known} in {folder / TOKENIZER} and {number} in {TOKENIZER_CONFIG} "
                "(added_tokens_decoder); correct the one that is wrong"
            )


def _stated_ids(folder: Path) -> Iterator[tuple[str, int]]:
    """Tokens and ids that tokenizer_config.json states."""
    stated = _optional(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    for number, entry in stated.items() if isinstance(stated, Mapping) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and str(number).isdecimal():
            yield entry["content"], int(number)


def _check_rows(folder: Path, tokens: _Tokens, rows: int) -> list[str]:
    if over := beyond(tokens.vocabulary, rows):
        first = min(over, key=over.__getitem__)
        if set(over) - set(tokens.added):
            raise ModelError(
                f"{folder / TOKENIZER} has {len(over)} tokens that the embedding of {rows} rows has no row for, the "
                f"first is {first} ({over[first]}); get the tokenizer that belongs to the weights, or call "
                f"model.resize_token_embeddings({max(over.values()) + 1}), save_pretrained, and export that folder"
            )
    lost = beyond(tokens.added, rows)
    return [beyond_note(lost, rows)] if lost else []


def _check_special(folder: Path, config: Mapping[str, Any], tokens: _Tokens, rows: int | None) -> list[str]:
    settings = _optional(folder / TOKENIZER_CONFIG)
    others = _optional(folder / SPECIAL_TOKENS)
    notes = []
    stated = {content for content, _ in _stated_ids(folder)}
    for role in IN_TEXTS:
        token, other = _content(settings.get(role)), _content(others.get(role))
        if token is not None and other is not None and token != other:
            raise ModelError(
                f"{role} is {token} in {folder / TOKENIZER_CONFIG} and {other} in {SPECIAL_TOKENS}; correct the one "
                f"that is wrong, or remove it from {SPECIAL_TOKENS}"
            )
        token = token or other
        if token is None:
            continue
        number = tokens.id_of(token)
        if number is None and token not in stated:
            raise ModelError(
                f"{role} is {token} in {folder / TOKENIZER_CONFIG}, and {TOKENIZER} has no such token; correct {role}, "
                "or set it to null if texts are to have none"
            )
        if rows is not None and number is not None and number >= rows:
            raise ModelError(
                f"{role} {token} has the id {number}, and the embedding has {rows} rows; call "
                f"model.resize_token_embeddings({number + 1}), save_pretrained, and export that folder"
            )
    for role in IN_CONFIG:
        notes += _config_note(folder, config, role, _content(settings.get(f"{role}_token")), tokens, rows)
    return notes


def _config_note(
    folder: Path,
    config: Mapping[str, Any],
    role: str,
    token: str | None,
    tokens: _Tokens,
    rows: int | None,
) -> list[str]:
    key = f"{role}_token_id"
    stated = config.get(key)
    numbers = [each for each in (stated if isinstance(stated, list) else [stated]) if isinstance(each, int)]
    if not numbers:
        return []
    over = [number for number in numbers if rows is not None and number >= rows]
    if over and role == "pad":
        raise ModelError(
            f"{key} of {folder / 'config.json'} is {over[0]}, and the embedding has {rows} rows; set it to a token of "
            "the vocabulary, or to null"
        )
    if over:
        return [
            f"{key} of config.json is {over[0]}, and the embedding has {rows} rows: texts have the tokenizer's"
        ]
    known = None if token is None else tokens.id_of(token)
    if known is None or known in numbers:
        return []
    return [
        f"{key} of config.json is {stated}, the tokenizer's {token} is {known}: texts have the tokenizer's"
    ]


def _length_notes(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    longest = _optional(folder / TOKENIZER_CONFIG).get("model_max_length")
    positions = config.get("max_position_embeddings")
    if (
        isinstance(longest, int | float)
        and isinstance(positions, int)
        and positions < longest < LARGEST_LENGTH
    ):
        yield (
            f"model_max_length of {TOKENIZER_CONFIG} is {int(longest)}, the model has {positions} positions: texts are "
            "cut at what it has positions for"
        )


def _content(token: object) -> str | None:
    """Text of a token that is given as such, or with its properties."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
