"""JSON files of a model folder, of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_runtime.data.diagnosis import other_format
from edge_runtime.data.rows import OTHER_FORMATS
from edge_runtime.errors import ModelError

#: Far above any real one: the largest indices list some ten thousand tensors.
MAX_JSON_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """A bounded JSON file that holds one object.

    Raises:
        ModelError: it cannot be read, is too large, or is something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has {size} bytes, over the limit of {MAX_JSON_BYTES}")
        data = path.read_bytes()
        if data.startswith(b"\xef\xbb\xbf"):
            raise ModelError(
                f"{path} begins with a byte order mark, which transformers does not read; save it as UTF-8 without one"
            )
        if data.startswith(OTHER_FORMATS):
            raise ModelError(f"{path} {other_format(data)}")
        found = json.loads(data)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(found).__name__}")
    return found
