"""Configuration files: TOML of a bounded size."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from edge_runtime.errors import ConfigError
from edge_runtime.figures import MIB, size

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


#: A cap that was written without its unit is taken for a number of MiB up to here, which is 64 GiB.
MOST_MEANT_MIB = 1 << 16


ByteSize = Annotated[int, Meta(ge=1, le=MAX_SIZE_BYTES)]


def parse_bytes(value: str | int) -> int:
    """Bytes from a number, or from text with a unit of 1024: ``"256M"``, ``"1G"``, ``"512 KiB"``.

    Raises:
        ConfigError: anything else, or more than ``MAX_SIZE_BYTES``.
    """
    match = _SIZE_FORM.fullmatch(str(value).replace(" ", ""))
    if match is None or isinstance(value, bool):
        raise ConfigError(f'{value!r} is not a size; write bytes as 268435456 or with a unit as "256M"')
    count = int(match["number"]) * _UNITS[match["unit"].upper()]
    if not 0 < count <= MAX_SIZE_BYTES:
        raise ConfigError(f"a size of {count} bytes is outside 1 to {MAX_SIZE_BYTES}")
    return count


def parse_cap(value: str | int) -> int:
    """A cap in bytes, as :func:`parse_bytes` reads it.

    Raises:
        ConfigError: it is no size, or is below 1 MiB, which is a slip of the unit; proposes the unit that was meant.
    """
    cap_bytes = parse_bytes(value)
    if cap_bytes >= MIB:
        return cap_bytes
    number = re.match("[0-9]+", str(value).replace(" ", ""))
    meant = (
        f'did you mean "{int(number[0])}M"?'
        if number and 1 <= int(number[0]) <= MOST_MEANT_MIB
        else ('write it with a unit, as "256M"')
    )
    raise ConfigError(f"a cap of {size(cap_bytes)} is less than any program takes; {meant}")
