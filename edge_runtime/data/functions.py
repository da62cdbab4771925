"""Rows that a function of the operator's own gives: ``data_function`` of device.toml. Only a worker calls it.

The function is called with the path of ``data`` and gives rows one by one, each a mapping with a text and perhaps a
label, as a line of a JSONL file has them. Its errors are told by their class alone, since their words may quote a row.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_runtime.data.tables import TableRow
from edge_runtime.errors import DataError


def function_rows(path: Path, name: str, folder: str) -> Iterator[TableRow]:
    """Rows that a function gives.

    Args:
        path: what the function is called with.
        name: the function, ``package.module:function``.
        folder: folder in which its module is looked for before all others; empty for none.

    Raises:
        DataError: there is no such function, it raises, or it gives something other than rows.
    """
    rows = _guarded(name, lambda: iter(_function(name, folder)(path)))
    number = 0
    while True:
        row = _guarded(name, lambda: next(rows, None))
        if row is None:
            return
        number += 1
        where = f"row {number} of {name}"
        if not isinstance(row, Mapping) or not all(isinstance(column, str) for column in row):
            raise DataError(f'{where} is no mapping of column names; give {{"text": …, "label": …}}')
        yield where, dict(row)


def _function(name: str, folder: str) -> Callable[[Path], Iterable[Any]]:
    """The function itself."""
    module_name, _, attributes = name.partition(":")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"data_function {name} cannot be found ({type(error).__name__}); its module must be installed beside "
            "edge-runtime, or lie in function_folder"
        ) from error
    if not callable(found):
        raise DataError(f"data_function {name} is no function; name one that gives rows")
    return found  # type: ignore[no-any-return] # what it gives is checked row by row


def _guarded(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (DataError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever the operator's own code raises
        raise DataError(
            f"data_function {name} raised {type(error).__name__}; call it by hand to see where"
        ) from None
