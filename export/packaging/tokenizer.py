"""The folder's tokenizer as the one file that a device reads."""

from __future__ import annotations

from pathlib import Path

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


def write_tokenizer(folder: Path, path: Path, *, trust_remote_code: bool = False) -> tuple[int, str | None]:
    """Write the tokenizer as one JSON file.

    Decoders often have no padding token. Padding is masked, so any token of the vocabulary serves: the unknown token is
    taken, or else the one that ends a text.

    Args:
        folder: model folder.
        path: file to write.
        trust_remote_code: whether Python code of the folder's own may run.

    Returns:
        The padding id; and a sentence for people if a token stands in for padding, else None.

    Raises:
        ModelError: there is no tokenizer that the device could read, or no token to pad with.
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
    if tokenizer.pad_token_id is not None:
        pad, note = int(tokenizer.pad_token_id), None
    else:
        pad, note = _stand_in(folder, tokenizer.unk_token_id, tokenizer.eos_token_id)
    path.write_text(text, "utf-8")
    return pad, note


def _stand_in(folder: Path, unknown: int | None, end: int | None) -> tuple[int, str]:
    for which, token in (("unknown", unknown), ("end-of-text", end)):
        if token is not None:
            return (
                int(token),
                f"The tokenizer has no padding token: texts are padded with the {which} token {token}",
            )
    raise ModelError(
        f"the tokenizer of {folder} has no padding, unknown or end-of-text token; set pad_token in its "
        "tokenizer_config.json"
    )
