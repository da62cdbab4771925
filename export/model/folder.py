"""Whether a Hugging Face folder can be exported at all, told from its files alone, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_runtime.errors import ModelError
from export.model.architecture import check_architecture

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
#: Weight files that transformers writes, in the order it looks for them; each may be cut into shards with an index.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
#: Far above any real one: the largest indices list some ten thousand tensors.
MAX_JSON_BYTES = 64 << 20
#: What transformers writes for a model that was never given labels.
UNNAMED_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}


def check_model_folder(folder: Path, labels: tuple[str, ...], *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that cannot become a package for these labels.

    Args:
        folder: model folder.
        labels: label set; empty for a causal language model.
        trust_remote_code: whether the operator lets the folder's own Python code run.

    Raises:
        ModelError: no configuration, code of its own, an architecture that no package can be made of, incomplete
            weights, or a label map of another size.
    """
    config = read_config(folder)
    if not trust_remote_code:
        _refuse_code(folder, config)
    check_architecture(folder / CONFIG, config, trust_remote_code=trust_remote_code)
    _check_labels(folder, config, labels)
    weight_files(folder)


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


def weight_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """The folder's weight files and the tensors in each; of a shard, those that the index places there.

    Raises:
        ModelError: no weights, a shard that is missing or incomplete, or an index that does not fit its shards.
    """
    for file in WEIGHTS:
        if (folder / f"{file}{INDEX_SUFFIX}").is_file():
            return _shards(folder, folder / f"{file}{INDEX_SUFFIX}")
        if (folder / file).is_file():
            return {file: tensor_names(folder / file)}
    raise ModelError(
        f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}, nor an index of shards; download them, or save "
        "the model again with save_pretrained"
    )


def _shards(folder: Path, index: Path) -> dict[str, tuple[str, ...]]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_file_name(p) for p in places.values()):
        raise ModelError(f"{index} has no weight_map from tensor names to file names in its folder")
    files: dict[str, list[str]] = {}
    for name, file in places.items():
        files.setdefault(file, []).append(name)
    if lost := sorted(file for file in files if not (folder / file).is_file()):
        raise ModelError(
            f"{folder} lacks {len(lost)} of the {len(files)} weight files its index names, the first is {lost[0]}; "
            "download the model again"
        )
    for file, names in files.items():
        if absent := sorted(set(names) - set(tensor_names(folder / file))):
            raise ModelError(
                f"{folder / file} lacks {absent[0]}, which {index.name} places there; download the model again"
            )
    return {file: tuple(names) for file, names in sorted(files.items())}


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that holds a NaN or an infinity.

    Args:
        name: name of the weight in its folder.
        tensor: values of the weight.

    Raises:
        ModelError: some values are not finite; the message counts them.
    """
    if not tensor.is_floating_point():
        return
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:
        raise ModelError(
            f"weight {name} holds {wrong} values that are not finite, of {tensor.numel()}; "
            "the folder is damaged, or its training diverged: get the model again"
        )


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in {"", ".", ".."} and Path(value).name == value


def tensor_names(path: Path) -> tuple[str, ...]:
    """Names of the tensors of a weight file; :class:`ModelError` if it is damaged."""
    if path.suffix != ".safetensors":
        return tuple(load_pickled(path))
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {error}; download the model again"
        ) from error


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped: nothing is read until it is used, and no code of the file runs.

    Raises:
        ModelError: it is damaged, or not a file of tensors.
    """
    try:
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damaged files raise whatever their format's reader raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be read: {reason}; download the model again") from error
    return loaded


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
