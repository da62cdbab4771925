"""Configuration files: TOML of a bounded size."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

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
