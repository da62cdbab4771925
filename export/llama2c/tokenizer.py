"""llama2.c's tokenizer file as a ``tokenizer.json`` that encodes alike.

The file holds max_token_length (int32), then for each token its score (float32), length (int32) and bytes. llama2.c
encodes by merging: it puts a space before the text, takes each character, or its bytes where it is no token (tokens 3
to 258), and joins the neighbours whose union is a token of the highest score, the leftmost of equals, until none is.

Byte-pair encoding does the same if merges are ranked by the score of what they make. Where two ways to make one token
overlap (``a`` + ``aa`` and ``aa`` + ``a``), a rank must prefer one for good, and llama2.c takes the leftmost: then
a longer left part goes first, which is how a run of one character comes to be cut from the left.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ModelError

UNKNOWN, BEGIN, END, FIRST_BYTE = 0, 1, 2, 3
FIRST_TEXT = FIRST_BYTE + 256
#: Names that the three special tokens and the bytes have in tokenizer.json.
SPECIAL = ("<unk>", "<s>", "</s>")
MAX_TOKEN_BYTES = 1024
_LENGTH, _ENTRY = struct.Struct("<i"), struct.Struct("<fi")


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary.

    Attributes:
        text: characters the token stands for.
        score: number that ranks the merge which makes it; the highest is merged first.
    """

    text: str
    score: float


def read_vocabulary(path: Path, size: int) -> list[Token]:
    """The tokens of a ``.bin`` file, by id.

    Args:
        path: tokenizer file.
        size: number of tokens in the checkpoint's vocabulary; the file does not say its own.

    Raises:
        ModelError: the file cannot be read, is truncated, holds another number of tokens, or one that is too long,
            not UTF-8, without a finite score, or there twice.
    """
    if size < FIRST_TEXT:
        raise ModelError(
            f"a vocabulary of {size} tokens has no room for the {FIRST_TEXT} that llama2.c needs"
        )
    try:
        with path.open("rb") as file:
            data = file.read(_LENGTH.size + size * (_ENTRY.size + MAX_TOKEN_BYTES) + 1)
    except OSError as error:
        raise ModelError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    tokens: list[Token] = []
    place = _LENGTH.size
    while len(tokens) < size:
        if place + _ENTRY.size > len(data):
            raise ModelError(
                f"{path} ends after {len(tokens)} tokens, the checkpoint has {size}; they do not belong together"
            )
        score, length = _ENTRY.unpack_from(data, place)
        place += _ENTRY.size
        tokens.append(_token(path, len(tokens), score, data[place : place + max(length, 0)], length))
        place += length
    if place != len(data):
        raise ModelError(
            f"{path} holds more than the checkpoint's {size} tokens; they do not belong together"
        )
    return _named(path, tokens)


def tokenizer_json(tokens: Sequence[Token]) -> str:
    """A ``tokenizer.json`` that begins every text with token ``BEGIN`` and encodes as llama2.c does."""
    begin = SPECIAL[BEGIN]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Prepend", "prepend": " "},
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": begin, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {begin: {"id": begin, "ids": [BEGIN], "tokens": [begin]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": SPECIAL[UNKNOWN],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {token.text: number for number, token in enumerate(tokens)},
                "merges": list(_merges(tokens)),
            },
        },
        ensure_ascii=False,
    )


def _merges(tokens: Sequence[Token]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best first."""
    texts = tokens[FIRST_TEXT:]
    known = {token.text for token in texts}
    for token in sorted(texts, key=lambda token: -token.score):
        for cut in range(len(token.text) - 1, 0, -1):
            left, right = token.text[:cut], token.text[cut:]
            if left in known and right in known:
                yield left, right


def _token(path: Path, number: int, score: float, data: bytes, length: int) -> Token:
    where = f"{path}: token {number}"
    if not 0 < length <= MAX_TOKEN_BYTES:
        raise ModelError(
            f"{where} has {length} bytes, it may have 1 to {MAX_TOKEN_BYTES}; fetch the file again"
        )
    if len(data) < length:
        raise ModelError(f"{where} is cut off by the end of the file; fetch it again")
    if not math.isfinite(score):
        raise ModelError(f"{where} has a score that is not finite; fetch the file again")
    try:
        return Token(data.decode("utf-8"), score)
    except UnicodeDecodeError as error:
        raise ModelError(f"{where} is not UTF-8; the file is no llama2.c tokenizer") from error


def _named(path: Path, tokens: list[Token]) -> list[Token]:
    """The tokens, special ones and bytes under the names that ``tokenizers`` expects; all texts must differ."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    named = [Token(name, 0.0) for name in names] + tokens[FIRST_TEXT:]
    seen: dict[str, int] = {}
    for number, token in enumerate(named):
        if token.text in seen:
            raise ModelError(
                f"{path}: tokens {seen[token.text]} and {number} are the same; it is no llama2.c tokenizer"
            )
        seen[token.text] = number
    return named
