"""Configuration files: TOML of a bounded size."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from edge_runtime.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table, unchecked.

    Raises:
        ConfigError: the file cannot be read, has more than ``MAX_CONFIG_BYTES``, or is not TOML; names it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} has more than {MAX_CONFIG_BYTES} bytes; is this a configuration file?")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


#: Bound beyond any device, which catches a slip of the unit.
MAX_SIZE_BYTES = 1 << 50


_SIZE_FORM = re.compile(r"(?P<number>[0-9]{1,15})(?P<unit>[KMGT]?)(i?B)?", re.IGNORECASE)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


ByteSize = Annotated[int, Meta(ge=1, le=MAX_SIZE_BYTES)]


def parse_bytes(value: str | int) -> int:
    """Bytes from a number, or from text with a unit of 1024: ``"256M"``, ``"1G"``, ``"512 KiB"``.

    Raises:
        ConfigError: anything else, or more than ``MAX_SIZE_BYTES``.
    """
    match = _SIZE_FORM.fullmatch(str(value).replace(" ", ""))
    if match is None or isinstance(value, bool):
        raise ConfigError(f'{value!r} is not a size; write bytes as 268435456 or with a unit as "256M"')
    size = int(match["number"]) * _UNITS[match["unit"].upper()]
    if not 0 < size <= MAX_SIZE_BYTES:
        raise ConfigError(f"a size of {size} bytes is outside 1 to {MAX_SIZE_BYTES}")
    return size
