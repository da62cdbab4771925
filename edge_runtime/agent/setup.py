"""What a device is set up with, as one digest: while it stays the same, what failed for a lasting cause fails again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from edge_runtime.agent.config import DeviceConfig


def setup_of(config: DeviceConfig, engine: str) -> str:
    """A digest of a device's configuration, its engine, and the size and time of its data file.

    It tells a coordinator that something was changed, and nothing of what: no token and no row goes into it.

    Args:
        config: the device's configuration.
        engine: name and version of its engine.

    Raises:
        OSError: the data file cannot be looked at.
    """
    found = None if config.data is None else config.data.stat()
    plain = msgspec.structs.replace(config, enrolment_token=None, enrolment_token_file=None)
    seen = (0, 0) if found is None else (found.st_size, found.st_mtime_ns)
    parts = (plain, engine, *seen)
    return hashlib.sha256(msgspec.json.encode(parts, enc_hook=_path)).hexdigest()[:32]


def _path(value: object) -> str:
    """The one type of a configuration that msgspec has to be told how to write."""
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))
