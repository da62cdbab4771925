"""The rows that simulated devices share: ``{"text", "label"}`` a line, and ``"owner"`` where somebody owns them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.rows import NO_LABEL, Line, Row, label_index, read_lines
from edge_runtime.errors import DataError

OWNER = "owner"
MAX_OWNER_CHARACTERS = 2000


@dataclass(frozen=True)
class LabelledRows:
    """A data file, whose row ``i`` is line ``i + 1``.

    Attributes:
        path: path of the file.
        texts: text of each row.
        labels: label of each row; None if rows have none.
        owners: owner of each row; None if rows have none.
        sha256: digest of the file.
        wheres: words that name each row in an error; empty for rows of no file.
    """

    path: Path
    texts: tuple[str, ...]
    labels: tuple[str | int, ...] | None
    owners: tuple[str, ...] | None
    sha256: str
    wheres: tuple[str, ...] = ()

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
        index = label_index(labels)
        wheres = self.wheres or tuple(f"row {number}" for number in range(1, len(self.texts) + 1))
        return [
            Row(text, index(label, where))
            for text, label, where in zip(self.texts, self.labels, wheres, strict=True)
        ]


def read_labelled_rows(path: Path) -> LabelledRows:
    """Parse a whole data file.

    Raises:
        DataError: it is missing, empty or too long, a row is malformed, or not all rows have the same keys.
    """
    lines = list(read_lines(path, labelled=None))
    owners = [_owner(line) for line in lines if OWNER in line.others]
    if owners and len(owners) != len(lines):
        raise DataError(f"{path} has rows with and without {OWNER}; give it to all or to none")
    labels = tuple(line.label for line in lines if line.label is not None)
    texts = tuple(line.text for line in lines)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    wheres = tuple(line.where for line in lines)
    return LabelledRows(path, texts, labels or None, tuple(owners) or None, digest, wheres)


def _owner(line: Line) -> str:
    owner = line.others[OWNER]
    if not isinstance(owner, str) or not 0 < len(owner) <= MAX_OWNER_CHARACTERS:
        raise DataError(
            f"{line.where} has an {OWNER} that is no string of 1 to {MAX_OWNER_CHARACTERS} characters; correct it"
        )
    return owner
