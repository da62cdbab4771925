"""Tensors taken out of a safetensors file: the rest is copied through, byte for byte.

A safetensors file allows no gap between tensors, so their offsets change. Memory holds a piece of a tensor at a time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

PIECE_BYTES = 16 << 20
INDEX_SUFFIX = ".index.json"
#: Headers end at a multiple of this many bytes, as the library pads them.
ALIGNMENT_BYTES = 8


def take_out(folder: Path, name: str, tensors: frozenset[str]) -> None:
    """Write a weight file anew without some tensors, and the index of shards without their names.

    Args:
        folder: model folder.
        name: name of the weight file; it is removed if nothing stays in it.
        tensors: names of the tensors as the file has them; others are passed over.
    """
    path = folder / name
    with path.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header: dict[str, Any] = json.loads(source.read(length))
        kept = {key: entry for key, entry in header.items() if key not in tensors}
        spans = {key: entry["data_offsets"] for key, entry in kept.items() if key != "__metadata__"}
        order = sorted(spans, key=lambda key: spans[key])
        position = 0
        for key in order:
            first, last = spans[key]
            kept[key] = {**kept[key], "data_offsets": [position, position + last - first]}
            position += last - first
        text = json.dumps(kept, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT_BYTES)
        written = path.with_suffix(".new")
        with written.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                first, last = spans[key]
                source.seek(8 + length + first)
                _copy(source, target, last - first)
            target.flush()
            os.fsync(target.fileno())
    written.replace(path)
    index = folder / f"model.safetensors{INDEX_SUFFIX}"
    if index.is_file():
        listed: dict[str, Any] = json.loads(index.read_bytes())
        listed["weight_map"] = {key: file for key, file in listed["weight_map"].items() if key not in tensors}
        index.write_text(json.dumps(listed, indent=2) + "\n", "utf-8")
        if not order:
            path.unlink()


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, PIECE_BYTES))
        target.write(piece)
        size -= len(piece)
