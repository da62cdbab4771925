"""What commands print with ``--json``: one document, of a type whose schema docs/json.md gives."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct


def json_text(answer: Struct | Sequence[Struct]) -> str:
    """An answer as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()
