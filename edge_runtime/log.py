"""Log lines: ``key=value`` to standard error, one per phase transition, never a data value."""

from __future__ import annotations

import json
import logging
import sys

_LOGGER = logging.getLogger("edge_runtime")


def start_logging() -> None:
    """Send log lines of level INFO and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("time=%(asctime)s level=%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    _LOGGER.handlers[:] = [handler]
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False


def note(phase: str, **fields: object) -> None:
    """Log that ``phase`` was reached."""
    _LOGGER.info("%s", _line(phase, fields))


def warn(phase: str, **fields: object) -> None:
    """Log that ``phase`` went wrong."""
    _LOGGER.warning("%s", _line(phase, fields))


def _line(phase: str, fields: dict[str, object]) -> str:
    return " ".join(f"{key}={_value(value)}" for key, value in {"phase": phase, **fields}.items())


def _value(value: object) -> str:
    """The value itself if it is one plain word, else quoted, so that no value can forge a line or a key."""
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    plain = text != "" and text.isprintable() and not set(text) & set(' "=\\')
    return text if plain else json.dumps(text)
