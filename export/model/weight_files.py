"""Which weight files of a folder are read, and what their headers say; found without torch.

The files are those that ``transformers`` itself would load, looked for in its order: a whole file comes before an
index of shards, safetensors before PyTorch's pickles. Of shards it loads every tensor, whatever the index says of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edge_runtime.data.diagnosis import other_format
from edge_runtime.errors import ModelError
from export.model.json_file import read_json_object

INDEX_SUFFIX = ".index.json"
#: Weight files that transformers writes, in the order it looks for them; each may be cut into shards with an index.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: The key of config.json that names another file to load.
#: What is there in the place of weights: git's pointer to them, or a page that says why they were not sent.
NO_WEIGHTS = (b"version https://git-lfs", b"<!", b"<html")
LONGEST_MARK_BYTES = 64
EXPLICIT = "transformers_weights"
#: What else holds weights, and so is named if it is not read.
WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
)
#: Files with such suffixes that hold no weights: what a training leaves.
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
#: Most files that a sentence names.
MOST_NAMED = 3
#: Tensors are compared this much at a time.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file.

    Attributes:
        file: file that holds it.
        dtype: safetensors' name of its element type, such as ``BF16``.
        shape: sizes of its axes.
        start: first byte in the file; 0 in a pickle.
        end: byte past its last one; 0 in a pickle.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class WeightFiles:
    """The weight files to read.

    Attributes:
        files: files, in the order in which they are loaded; of a tensor that several hold the last counts.
        index: index that names them; None for a whole file.
        places: file name of each tensor, as the index has it; empty for a whole file.
        total_bytes: size of all tensors, as the index has it; None if it does not say.
        notes: sentences for people about weight files that are not read.
    """

    files: tuple[Path, ...]
    index: Path | None
    places: Mapping[str, str]
    total_bytes: int | None
    notes: tuple[str, ...]

    @property
    def pickled(self) -> bool:
        """Whether they are PyTorch's own format, which only torch can read."""
        return self.files[0].suffix != ".safetensors"


def find_weights(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The weight files of a folder that transformers would load.

    Args:
        folder: model folder.
        config: content of its config.json.

    Raises:
        ModelError: no weights, only weights in a format of others, or an index that names no files of the folder.
    """
    explicit = config.get(EXPLICIT)
    if explicit is not None:
        if not _is_file_name(explicit) or not explicit.endswith(
            (".safetensors", f".safetensors{INDEX_SUFFIX}")
        ):
            raise ModelError(
                f"{EXPLICIT} of {folder / 'config.json'} is {explicit!r}, it must name a .safetensors file of the "
                "folder or an index of such; remove the key if the folder has model.safetensors"
            )
        return _found(folder, folder / explicit)
    for name in WEIGHTS:
        for path in (folder / name, folder / f"{name}{INDEX_SUFFIX}"):
            if path.is_file():
                return _found(folder, path)
    raise ModelError(_without_weights(folder))


def read_headers(weights: WeightFiles) -> dict[str, StoredTensor]:
    """All tensors of safetensors files, from their headers.

    Raises:
        ModelError: a file is damaged, or files and index contradict each other.
    """

    def equal(name: str, first: StoredTensor, second: StoredTensor) -> bool:
        return equal_bytes(first, second)

    return gather(weights, {path: _header(path) for path in weights.files}, equal)


def gather(
    weights: WeightFiles,
    headers: Mapping[Path, Mapping[str, StoredTensor]],
    equal: Callable[[str, StoredTensor, StoredTensor], bool],
) -> dict[str, StoredTensor]:
    """All tensors of all files by name, once the files and their index agree.

    Args:
        weights: files, and their index.
        headers: tensors of each file.
        equal: whether two tensors of one name have the same bytes.

    Raises:
        ModelError: the index places a tensor where it is not, or two files hold different values of one.
    """
    where = "" if weights.index is None else weights.index.name
    for name, file in weights.places.items():
        path = weights.files[0].parent / file
        if name not in headers[path]:
            raise ModelError(f"{path} lacks {name}, which {where} places there; download the model again")
    found: dict[str, StoredTensor] = {}
    for path in weights.files:
        for name, tensor in headers[path].items():
            if name in found and not equal(name, found[name], tensor):
                raise ModelError(
                    f"{found[name].file.name} and {path.name} of {path.parent} hold different values of {name}; "
                    f"transformers would take the one of {path.name}: save the model again from the values you mean"
                )
            found[name] = tensor
    return found


def size_note(weights: WeightFiles, tensors: Iterable[StoredTensor]) -> str | None:
    """A sentence if the index states another size than the tensors of its files have."""
    held = sum(tensor.end - tensor.start for tensor in tensors)
    if weights.index is None or weights.total_bytes in (None, held) or weights.pickled:
        return None
    stated = f"{weights.index.name} states {weights.total_bytes} bytes of tensors"
    return f"{stated}, its files hold {held}: what the files hold is read"


def listed(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - MOST_NAMED
    return ", ".join(ordered[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _found(folder: Path, path: Path) -> WeightFiles:
    if not path.is_file():
        raise ModelError(
            f"{folder} lacks {path.name}, which {EXPLICIT} of its config.json names; download it"
        )
    if not path.name.endswith(INDEX_SUFFIX):
        return WeightFiles((path,), None, {}, None, _unread(folder, {path}))
    index = read_json_object(path)
    places, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not places or not all(_is_file_name(p) for p in places.values()):
        raise ModelError(f"{path} has no weight_map from tensor names to file names in its folder")
    files = sorted(set(places.values()))
    if lost := [file for file in files if not (folder / file).is_file()]:
        raise ModelError(
            f"{folder} lacks {len(lost)} of the {len(files)} weight files its index names, the first is {lost[0]}; "
            "download the model again"
        )
    if not isinstance(metadata, dict):
        raise ModelError(
            f'{path} has no metadata, and transformers reads none without; add "metadata": {{}} to it'
        )
    size = metadata.get("total_size")
    paths = tuple(folder / file for file in files)
    total = int(size) if isinstance(size, int | float) else None
    return WeightFiles(paths, path, places, total, _unread(folder, {path, *paths}))


def _unread(folder: Path, read: set[Path]) -> tuple[str, ...]:
    """A sentence that names the other weight files, if there are any."""
    found = [
        *folder.iterdir(),
        *(path for child in folder.iterdir() if child.is_dir() for path in child.iterdir()),
    ]
    indices = {f"{name}{INDEX_SUFFIX}" for name in WEIGHTS}
    others = [
        str(path.relative_to(folder))
        for path in found
        if path.is_file()
        and path not in read
        and (path.suffix in WEIGHT_SUFFIXES or path.name in indices)
        and not path.name.startswith(TRAINING_STATE)
        and path.relative_to(folder).parts[0] not in (".git", ".cache")
    ]
    if not others:
        return ()
    named = "file" if len(others) == 1 else "files"
    used = sorted(path.name for path in read if not path.name.endswith(INDEX_SUFFIX))
    return (
        f"{len(others)} weight {named} not read ({listed(others)}): the weights are those of {listed(used)}",
    )


def why_foreign(folder: Path) -> str | None:
    """Why a folder is none that transformers loads, if its files show what it is instead; and what to do."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())

    def first(found: Callable[[str], bool]) -> str | None:
        return next((name for name in names if found(name)), None)

    if "adapter_config.json" in names:
        return f"{folder} is a peft adapter without its model; name the model's folder, and this one with --adapter"
    if (name := first(lambda each: each.endswith(".gguf"))) is not None:
        return (
            f"{folder} has its weights as GGUF alone ({name}), which is quantised; export the folder of the float "
            "model it was made from, with config.json and model.safetensors"
        )
    if (name := first(lambda each: each.startswith("consolidated."))) is not None:
        return (
            f"{folder} has its weights in the layout of their publisher alone ({name}); export the model's folder in "
            "transformers' layout, with model.safetensors"
        )
    if (name := first(lambda each: each.endswith((".h5", ".msgpack", ".ckpt", ".ot")))) is not None:
        return (
            f"{folder} has weights for another framework alone ({name}); export the model's folder with "
            "model.safetensors or pytorch_model.bin"
        )
    return None


def _without_weights(folder: Path) -> str:
    """Why a folder has no weights to read, and what to do."""
    if (foreign := why_foreign(folder)) is not None:
        return foreign
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    other = next((name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))), None)
    hint = "download them, or save the model again with save_pretrained"
    if other is not None:
        hint = f"it has {other}: {hint}"
    return f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}, nor an index of shards; {hint}"


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header, once the library has found it whole.

    The file is eight bytes with the length of a JSON header, the header, and the data that its offsets count from
    (safetensors' README, "Format").
    """
    with path.open("rb") as file:
        begins = file.read(LONGEST_MARK_BYTES)
    if begins.startswith(NO_WEIGHTS):
        raise ModelError(f"{path} {other_format(begins)}")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {error}; download the model again"
        ) from error
    header.pop("__metadata__", None)
    first = 8 + length
    return {
        name: StoredTensor(
            path,
            str(entry["dtype"]),
            tuple(entry["shape"]),
            first + entry["data_offsets"][0],
            first + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }


def equal_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of safetensors files have one type, one shape and the same bytes; read a piece at a time."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.end - first.start
        while left > 0:
            piece = min(left, PIECE_BYTES)
            if one.read(piece) != other.read(piece):
                return False
            left -= piece
    return True


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in {"", ".", ".."} and Path(value).name == value
