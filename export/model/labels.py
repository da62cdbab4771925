"""The label set that a person hands in: a JSON array, whose order becomes the order of the model's classes."""

from __future__ import annotations

import json
from pathlib import Path

from edge_runtime.data.diagnosis import other_format
from edge_runtime.data.rows import OTHER_FORMATS
from edge_runtime.errors import ConfigError

MAX_LABELS_BYTES = 64 << 20
_FORM = 'a JSON array of the label set, such as ["billing", "delivery"]'


def read_labels(path: Path) -> tuple[str, ...]:
    """The label set. Whole numbers stand for the labels that are written like them.

    Raises:
        ConfigError: the file cannot be read, is too large, or holds anything but an array of at least two distinct
            labels; names the cause and what to do.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LABELS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the label set {path}: {error.strerror}") from error
    if len(data) > MAX_LABELS_BYTES:
        raise ConfigError(f"{path} has more than {MAX_LABELS_BYTES} bytes; it should hold one label set")
    labels = _parsed(path, data)
    if isinstance(labels, dict):
        raise ConfigError(
            f"{path} holds a JSON object; write the labels alone, in the order of their classes: {_FORM}"
        )
    if not isinstance(labels, list):
        raise ConfigError(f"{path} must hold {_FORM}")
    kinds = {type(label) for label in labels}
    if not kinds <= {str} and kinds != {int}:
        raise ConfigError(f"{path} must hold labels of one kind, all strings or all whole numbers: {_FORM}")
    names = [str(label) for label in labels]
    if blank := [number for number, name in enumerate(names, start=1) if not name.strip()]:
        raise ConfigError(f"label {blank[0]} of {path} is empty; give it a name or remove it")
    if len(names) < 2:
        raise ConfigError(f"{path} holds {len(names)} labels; a classifier needs at least two")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path} holds {len(twice)} labels more than once, the first is {twice[0]!r}")
    return tuple(names)


def _parsed(path: Path, data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        if data.startswith(OTHER_FORMATS):
            raise ConfigError(f"{path} {other_format(data)}") from None
        raise ConfigError(
            f"{path} is not UTF-8; save it as UTF-8, or convert it from its encoding: iconv -f LATIN1 -t UTF-8"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deep; it must hold {_FORM}") from None
    except ValueError as error:
        if data.startswith(OTHER_FORMATS):
            raise ConfigError(f"{path} {other_format(data)}") from None
        raise ConfigError(f"{path} is not JSON ({error}); it must hold {_FORM}") from error
