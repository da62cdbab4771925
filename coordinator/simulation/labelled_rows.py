"""The rows that simulated devices share: ``{"text", "label"}`` a line, and ``"owner"`` where somebody owns them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edge_runtime.data.rows import MAX_LABEL_CHARACTERS, MAX_ROW_BYTES, MAX_ROWS, NO_LABEL, Row
from edge_runtime.errors import DataError

_FORM = (
    'an object {"text": "…", "label": "…"}, or without the label for language modelling, "owner" beside them'
)


class _Line(Struct, frozen=True, forbid_unknown_fields=True):
    text: Annotated[str, Meta(min_length=1)]
    label: Annotated[str, Meta(max_length=MAX_LABEL_CHARACTERS)] | UnsetType = UNSET
    owner: Annotated[str, Meta(min_length=1, max_length=MAX_LABEL_CHARACTERS)] | UnsetType = UNSET


@dataclass(frozen=True)
class LabelledRows:
    """A data file, whose row ``i`` is line ``i + 1``.

    Attributes:
        path: path of the file.
        texts: text of each row.
        labels: label of each row; None if rows have none.
        owners: owner of each row; None if rows have none.
        sha256: digest of the file.
    """

    path: Path
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    owners: tuple[str, ...] | None
    sha256: str

    def indexed(self, labels: tuple[str, ...]) -> list[Row]:
        """The rows in the form that a package with these labels takes; one without labels models language.

        Raises:
            DataError: rows have labels where the package has none, or the other way round, or other ones.
        """
        if not labels:
            if self.labels is not None:
                raise DataError(f"{self.path} has labels, and language modelling takes none; remove them")
            return [Row(text, NO_LABEL) for text in self.texts]
        if self.labels is None:
            raise DataError(
                f"{self.path} has no labels, and the package sorts texts into {len(labels)}; add them"
            )
        index = {label: position for position, label in enumerate(labels)}
        for number, label in enumerate(self.labels, start=1):
            if label not in index:
                raise DataError(
                    f"{self.path} line {number} has a label outside the package's set of {len(labels)}; "
                    "correct or remove it"
                )
        return [Row(text, index[label]) for text, label in zip(self.texts, self.labels, strict=True)]


def read_labelled_rows(path: Path) -> LabelledRows:
    """Parse a whole data file.

    Raises:
        DataError: it is missing, empty or too long, a row is malformed, or not all rows have the same keys.
    """
    decoder = msgspec.json.Decoder(_Line)
    digest = hashlib.sha256()
    lines: list[_Line] = []
    try:
        with path.open("rb") as file:
            while data := file.readline(MAX_ROW_BYTES + 1):
                digest.update(data)
                lines.append(_parse(decoder, data, f"{path} line {len(lines) + 1}"))
                if len(lines) > MAX_ROWS:
                    raise DataError(f"{path} has more than {MAX_ROWS} rows; keep fewer")
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    if not lines:
        raise DataError(f"{path} is empty; it needs at least one row")
    labels = [line.label for line in lines if line.label is not UNSET]
    owners = [line.owner for line in lines if line.owner is not UNSET]
    for name, found in (("label", labels), ("owner", owners)):
        if found and len(found) != len(lines):
            raise DataError(f"{path} has rows with and without {name}; give it to all or to none")
    texts = tuple(line.text for line in lines)
    return LabelledRows(path, texts, tuple(labels) or None, tuple(owners) or None, digest.hexdigest())


def _parse(decoder: msgspec.json.Decoder[_Line], data: bytes, where: str) -> _Line:
    if len(data) > MAX_ROW_BYTES:
        raise DataError(f"{where} has more than {MAX_ROW_BYTES} bytes; shorten or remove it")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise DataError(f"{where} is not {_FORM}") from None
