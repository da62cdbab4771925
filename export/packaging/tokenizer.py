"""The folder's tokenizer as the one file that a device reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from edge_runtime.errors import ModelError

#: A folder with none of these has no vocabulary; transformers would make up an empty one.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def write_tokenizer(
    folder: Path, path: Path, rows: int, *, trust_remote_code: bool = False
) -> tuple[int, str | None]:
    """Write the tokenizer as one JSON file.

    Decoders often have no padding token, or one that the embedding has no row for. Padding is masked, so any token of
    the vocabulary serves: the unknown token is taken, or else the one that ends a text. Added tokens without a row are
    left out.

    Args:
        folder: model folder.
        path: file to write.
        rows: rows of the model's embedding.
        trust_remote_code: whether Python code of the folder's own may run.

    Returns:
        The padding id; and a sentence for people if a token stands in for padding, else None.

    Raises:
        ModelError: there is no tokenizer that the device could read, no token to pad with, or one in every text that
            the embedding has no row for.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer the device could read: none of {', '.join(VOCABULARIES)} is there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, use_fast=True, trust_remote_code=trust_remote_code
        )
        text = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} has no tokenizer the device could read: {reason}") from error
    text = _fitted(folder, text, rows)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        pad, note = int(tokenizer.pad_token_id), None
    else:
        pad, note = _stand_in(folder, rows, tokenizer)
    path.write_text(text, "utf-8")
    return pad, note


def _fitted(folder: Path, text: str, rows: int) -> str:
    """A tokenizer without the added tokens that have no row; one whose other tokens lack rows is refused.

    A tokenizer.json states most of this, and the folder's files were looked at before; what transformers makes of other
    files, such as a vocab.txt or a tokenizer_config.json, is known only here.
    """
    content = json.loads(text)
    added = content.get("added_tokens") or []
    over = {token["content"] for token in added if token["id"] >= rows}
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, the place is the id
        numbers = {entry[0]: number for number, entry in enumerate(vocabulary)}
    else:
        numbers = vocabulary
    lost = {token: number for token, number in numbers.items() if number >= rows and token not in over}
    lost |= {token: number for token, number in _put_in(content.get("post_processor")) if number >= rows}
    if lost:
        first = min(lost, key=lost.__getitem__)
        raise ModelError(
            f"the tokenizer of {folder} gives {first} the id {lost[first]}, and the embedding has {rows} rows; get the "
            f"tokenizer that belongs to the weights, or call model.resize_token_embeddings({max(lost.values()) + 1}), "
            "save_pretrained, and export that folder"
        )
    if not over:
        return text
    content["added_tokens"] = [token for token in added if token["id"] < rows]
    if isinstance(vocabulary, list):
        content["model"]["vocab"] = vocabulary[:rows]
    else:
        content["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < rows}
    return json.dumps(content, ensure_ascii=False)


def _put_in(processor: Any) -> Iterator[tuple[str, int]]:
    """Tokens that a post-processor puts into every text, with their ids."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or ():
        yield from _put_in(part)
    for name, token in (processor.get("special_tokens") or {}).items():
        yield from ((name, number) for number in token["ids"])
    for role in ("cls", "sep"):
        if role in processor:
            yield processor[role][0], processor[role][1]


def _stand_in(folder: Path, rows: int, tokenizer: Any) -> tuple[int, str]:
    missing = (
        "no padding token"
        if tokenizer.pad_token_id is None
        else "a padding token without a row in the embedding"
    )
    for which, token in (("unknown", tokenizer.unk_token_id), ("end-of-text", tokenizer.eos_token_id)):
        if token is not None and token < rows:
            return (
                int(token),
                f"The tokenizer has {missing}: texts are padded with the {which} token {token}",
            )
    raise ModelError(
        f"the tokenizer of {folder} has no padding, unknown or end-of-text token; set pad_token in its "
        "tokenizer_config.json"
    )
