"""The device's own examples: a JSONL file of ``{"text": …, "label": …}``, read as rows of bounded size.

For language modelling a row is ``{"text": …}`` alone: the text itself is what is predicted.

Errors name file, line number and limit. They never quote the text, the label or anything else from the file, because an
error's message may travel to the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edge_runtime.errors import DataError

MAX_ROW_BYTES = 1 << 20
MAX_ROWS = 1_000_000
MAX_LABEL_CHARACTERS = 2000
#: The label of a row that has none.
NO_LABEL = -1
_COUNT_CHUNK_BYTES = 1 << 18


class Row(Struct, frozen=True):
    """One example.

    Attributes:
        text: its text.
        label: index of its label among the package's labels; ``NO_LABEL`` if it has none.
    """

    text: str
    label: int = NO_LABEL


class _Line(Struct, frozen=True, forbid_unknown_fields=True):
    text: Annotated[str, Meta(min_length=1)]
    label: Annotated[str, Meta(max_length=MAX_LABEL_CHARACTERS)] | UnsetType = UNSET


_DECODER = msgspec.json.Decoder(_Line)
_LABELLED = 'an object {"text": "…", "label": "…"} with exactly these two strings'
_TEXT_ALONE = 'an object {"text": "…"} with exactly this string'
#: Form of a row, by whether rows have labels; None stands for the first row, before that is known.
_FORMS = {True: _LABELLED, False: _TEXT_ALONE, None: f"{_LABELLED}, or {_TEXT_ALONE}"}


def load_rows(path: Path, labels: Sequence[str]) -> list[Row]:
    """All rows of a data file; row ``i`` is line ``i + 1``.

    Args:
        path: the JSONL file.
        labels: the package's labels in their order; empty for a causal language model.

    Raises:
        DataError: the file is missing, empty or too long; or a row is malformed, too long or without text, or has a
            label that is not among ``labels``.
    """
    index = {label: position for position, label in enumerate(labels)}
    rows = []
    for where, line in _parsed(path, labelled=bool(labels)):
        if line.label is UNSET:
            rows.append(Row(line.text))
            continue
        label = index.get(line.label)
        if label is None:
            raise DataError(
                f"{where} has a label outside the package's set of {len(index)}; correct or remove it"
            )
        rows.append(Row(line.text, label))
    return rows


def check_rows(path: Path) -> int:
    """Parse a data file without knowing the package.

    Returns:
        The number of rows. They may have labels or not, but all must be like the first.

    Raises:
        DataError: the file is missing, empty or too long; or a row is malformed, too long or without text.
    """
    return sum(1 for _ in _parsed(path, labelled=None))


def count_rows(path: Path) -> int:
    """Number of lines of a data file, without parsing them.

    Raises:
        DataError: the file cannot be read.
    """
    lines, last = 0, b"\n"
    try:
        with path.open("rb") as file:
            while chunk := file.read(_COUNT_CHUNK_BYTES):
                lines += chunk.count(b"\n")
                last = chunk[-1:]
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    return lines if last == b"\n" else lines + 1


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for number in range(1, MAX_ROWS + 2):
                line = file.readline(MAX_ROW_BYTES + 1)
                if not line:
                    return
                if number > MAX_ROWS:
                    raise DataError(f"{path} has more than {MAX_ROWS} rows; keep the most recent ones")
                yield line
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error


def _parsed(path: Path, *, labelled: bool | None) -> Iterator[tuple[str, _Line]]:
    """Each row, with the words that name it in an error.

    Args:
        path: the JSONL file.
        labelled: whether rows must have a label; None makes all follow the first.
    """
    number = 0
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path} line {number}"
        parsed = _parse(line, where, labelled)
        labelled = parsed.label is not UNSET
        yield where, parsed
    if number == 0:
        raise DataError(f"{path} is empty; it needs at least one row")


def _parse(line: bytes, where: str, labelled: bool | None) -> _Line:
    if len(line) > MAX_ROW_BYTES:
        raise DataError(f"{where} has more than {MAX_ROW_BYTES} bytes; shorten or remove it")
    try:
        parsed = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The cause may quote the row, so it is not chained.
        raise DataError(f"{where} is not {_FORMS[labelled]}") from None
    if labelled is not None and labelled != (parsed.label is not UNSET):
        has = "has no label" if labelled else "has a label, and language modelling takes none"
        raise DataError(f"{where} {has}; it must be {_FORMS[labelled]}")
    if not parsed.text.strip():
        raise DataError(f"{where} has an empty text; remove it")
    return parsed
