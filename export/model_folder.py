"""Whether a Hugging Face folder can be exported at all, told from its files alone, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_runtime.errors import ModelError
from export.checkpoint import weight_files

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
#: Far above any real one: the largest indices list some ten thousand tensors.
MAX_JSON_BYTES = 64 << 20
#: What transformers writes for a model that was never given labels.
UNNAMED_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}


def check_model_folder(folder: Path, labels: tuple[str, ...], *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that cannot become a package for these labels.

    Args:
        folder: the model folder.
        labels: the label set; empty for a causal language model.
        trust_remote_code: whether the operator lets the folder's own Python code run.

    Raises:
        ModelError: no configuration, code of its own, incomplete weights, or a label map of another size.
    """
    config = read_config(folder)
    if not trust_remote_code:
        _refuse_code(folder, config)
    _check_labels(folder, config, labels)
    _check_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dict; :class:`ModelError` if there is none."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no {CONFIG}")
    return read_json_object(folder / CONFIG)


def read_json_object(path: Path) -> dict[str, Any]:
    """A bounded JSON file that holds one object.

    Raises:
        ModelError: it cannot be read, is too large, or is something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has {size} bytes, over the limit of {MAX_JSON_BYTES}")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(found).__name__}")
    return found


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that holds a NaN or an infinity; ``name`` is its name in the folder.

    Raises:
        ModelError: it does; the message counts them.
    """
    if not tensor.is_floating_point():
        return
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:
        raise ModelError(
            f"weight {name} holds {wrong} values that are not finite, of {tensor.numel()}; "
            "the folder is damaged, or its training diverged: get the model again"
        )


def _check_weights(folder: Path) -> None:
    """Every weight file must be there, whole, and hold what an index places in it; only headers are read."""
    places = weight_files(folder)
    for file in sorted({file for file in places.values() if file.suffix == ".safetensors"}):
        placed = {name for name, place in places.items() if place == file}
        if absent := sorted(placed - set(_tensor_names(file))):
            raise ModelError(
                f"{file} lacks {absent[0]}, which the folder's index places there; download the model again"
            )


def _tensor_names(path: Path) -> tuple[str, ...]:
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {error}; download the model again"
        ) from error


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    found = {CONFIG: config}
    if (folder / TOKENIZER_CONFIG).is_file():
        found[TOKENIZER_CONFIG] = read_json_object(folder / TOKENIZER_CONFIG)
    for name, content in found.items():
        if content.get("auto_map"):
            raise ModelError(
                f"{folder / name} asks to run Python code of the folder's own (auto_map); read that code, then give "
                "--trust-remote-code, or use a model that transformers knows by itself"
            )


def _check_labels(folder: Path, config: dict[str, Any], labels: tuple[str, ...]) -> None:
    named = config.get("id2label")
    if not labels or named is None or named == UNNAMED_LABELS:
        return
    if not isinstance(named, dict):
        raise ModelError(f"id2label of {folder / CONFIG} must be an object from class index to label")
    if len(named) != len(labels):
        raise ModelError(
            f"{folder / CONFIG} names {len(named)} labels (id2label) and --labels has {len(labels)}; give the "
            "model's own, or remove id2label and label2id there if it shall learn others"
        )
