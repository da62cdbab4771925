"""The device's own examples: a JSONL file of ``{"text": …, "label": …}``, read as rows of bounded size.

For language modelling a row is ``{"text": …}`` alone: the text itself is what is predicted.

What people's files differ in is read where it can mean one thing only: a byte order mark, blank lines, further columns,
labels written as whole numbers. Everything else is refused in one line with file, line number, cause and cure. Errors
never quote the text, the label or anything else from a row, because an error's message may travel to the coordinator;
of the names of columns they tell only those listed in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from edge_runtime.data.reading import Reading
from edge_runtime.data.tables import SEPARATORS, TableRow, query_rows, table_rows
from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import DataError

MAX_ROW_BYTES = 1 << 20
MAX_ROWS = 1_000_000
MAX_LABEL_CHARACTERS = 2000
#: All rows, under the names that rows have.
AS_IT_IS = Reading()
#: The label of a row that has none.
NO_LABEL = -1
TEXT, LABEL = "text", "label"
#: Columns that other tools call the text or the label; a file that has them instead needs them renamed.
TEXT_SYNONYMS = (
    *(
        "sentence",
        "content",
        "review",
        "question",
        "query",
        "utterance",
        "input",
        "inputs",
        "prompt",
        "document",
    ),
    *("Text", "TEXT", "body", "message", "title"),
)
LABEL_SYNONYMS = ("labels", "intent", "category", "class", "target", "Label", "LABEL", "output", "sentiment")
#: Columns that make a row more than one text: to leave them out would change what is learned.
SECOND_TEXTS = (
    *("text_pair", "text2", "text_b", "sentence2", "sentence_b", "question2", "premise", "hypothesis"),
    *("context", "passage", "answer", "response", "completion", "chosen", "rejected", "messages"),
)
#: Columns of rows that are a chat, or an instruction and its answer.
SEVERAL_TEXTS = ("messages", "conversations", "conversation", "instruction")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: First bytes of files that are no text in UTF-8; :mod:`edge_runtime.data.diagnosis` has the words for each.
OTHER_FORMATS = (
    *(b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff", b"{\x00", b"\x00{", b"\x1f\x8b", b"(\xb5/\xfd"),
    *(b"\xfd7zXZ", b"BZh", b"PK\x03\x04", b"PAR1", b"ARROW1", b"SQLite format 3", b"version https://git-lfs"),
    *(b"<!", b"<html"),
)
_COUNT_CHUNK_BYTES = 1 << 18
_DECODER = msgspec.json.Decoder()
_LABELLED = 'an object {"text": "…", "label": "…"}'
_TEXT_ALONE = 'an object {"text": "…"}'
#: What a row must be, by whether it has a label; None: unknown, in the first row.
_FORMS = {True: _LABELLED, False: _TEXT_ALONE, None: f"{_LABELLED}, or {_TEXT_ALONE}"}


class Row(Struct, frozen=True):
    """One example.

    Attributes:
        text: its text.
        label: index of its label among the package's labels; ``NO_LABEL`` if it has none.
    """

    text: str
    label: int = NO_LABEL


@dataclass(frozen=True)
class Line:
    """One row as the file has it.

    Attributes:
        where: words that name file and line in an error.
        text: its text, never blank.
        label: its label; a whole number where the file has one instead of a name; None without one.
        others: its further columns.
    """

    where: str
    text: str
    label: str | int | None
    others: dict[str, Any]


@dataclass(frozen=True)
class RowsSummary:
    """What a data file holds, without any of its values.

    Attributes:
        rows: number of rows.
        labelled: whether they have labels.
        numbered: whether labels are whole numbers.
        unused_columns: number of further columns, which nothing reads.
    """

    rows: int
    labelled: bool
    numbered: bool
    unused_columns: int

    @property
    def note(self) -> str:
        """What a person should know of how the file is read; empty if there is nothing."""
        notes = []
        if self.numbered:
            notes.append("labels are whole numbers, read as the package's labels of that name or position")
        if self.unused_columns:
            notes.append(f"{self.unused_columns} columns beside text and label are not used")
        return "; ".join(notes)


def load_rows(
    path: Path, labels: Sequence[str], reading: Reading = AS_IT_IS, *, may_be_empty: bool = False
) -> list[Row]:
    """All rows of a data file, in its order.

    Args:
        path: the file: JSONL, or a table, see :func:`read_lines`.
        labels: the package's labels in their order; empty for a causal language model.
        reading: which rows, and how they are found.
        may_be_empty: whether a file without a row is no error.

    Raises:
        DataError: the file is missing, empty or too long; or a row is malformed, too long or without text, or has a
            label that is not among ``labels``.
    """
    index = label_index(labels)
    return [
        Row(line.text) if line.label is None else Row(line.text, index(line.label, line.where))
        for line in read_lines(path, labelled=bool(labels), reading=reading, may_be_empty=may_be_empty)
    ]


def summarise_rows(path: Path, reading: Reading = AS_IT_IS) -> RowsSummary:
    """What the rows of a part are like; there may be none.

    Raises:
        DataError: a row that :func:`load_rows` would refuse whatever the package's labels are.
    """
    return _summary(_lines(path, labelled=None, reading=reading))


def check_rows(path: Path, reading: Reading = AS_IT_IS) -> RowsSummary:
    """Parse a data file without knowing the package; rows may have labels or not, but all must be like the first.

    Raises:
        DataError: a row that :func:`load_rows` would refuse whatever the package's labels are.
    """
    return _summary(read_lines(path, labelled=None, reading=reading))


def _summary(lines: Iterator[Line]) -> RowsSummary:
    rows, labelled, numbered = 0, False, False
    columns: set[str] = set()
    for line in lines:
        rows += 1
        labelled = line.label is not None
        numbered = numbered or isinstance(line.label, int)
        columns.update(line.others)
    return RowsSummary(rows, labelled, numbered, len(columns))


def count_rows(path: Path, reading: Reading = AS_IT_IS) -> int:
    """Number of rows of a data file; in JSONL that is read whole these are lines that are not blank, unparsed.

    Raises:
        DataError: the file cannot be read; or rows have to be looked at, and one is malformed.
    """
    if reading.function or reading.query or path.suffix.lower() in SEPARATORS or not reading.includes_all:
        return sum(1 for _ in _lines(path, labelled=None, reading=reading))
    rows, blank = 0, True
    try:
        with path.open("rb") as file:
            while chunk := file.read(_COUNT_CHUNK_BYTES):
                first, *rest = chunk.split(b"\n")
                blank = blank and not first.strip(b" \t\r\v\f" + _BYTE_ORDER_MARK)
                for part in rest:
                    rows += not blank
                    blank = not part.strip()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    return rows + (not blank)


def label_index(labels: Sequence[str]) -> Callable[[str | int, str], int]:
    """A function from a row's label, and the words that name the row, to the label's position in the set.

    A whole number means the label of that name, where labels are numbers themselves, and else the label at that
    position, counted from 0. The function raises :class:`DataError` for a label that is not in the set.
    """
    names = {label: position for position, label in enumerate(labels)}
    alike = {label.strip().casefold() for label in labels}
    are_numbers = all(label.removeprefix("-").isdecimal() for label in labels)

    def position(label: str | int, where: str) -> int:
        if isinstance(label, int) and not are_numbers:
            if 0 <= label < len(labels):
                return label
            raise DataError(
                f"{where} has a whole number as its label, outside 0 to {len(labels) - 1}, the positions of the "
                f"package's {len(labels)} labels; correct it, or write the label's name"
            )
        found = names.get(str(label))
        if found is None:
            hint = ""
            if str(label).strip().casefold() in alike:
                hint = ", which differs from one of them in spaces or capitals alone"
            elif not are_numbers and str(label).strip().isdecimal():
                hint = ", a number in quotes; without them it is a position"
            raise DataError(
                f"{where} has a label outside the package's set of {len(labels)}{hint}; correct or remove it"
            )
        return found

    return position


def read_lines(
    path: Path, *, labelled: bool | None, reading: Reading = AS_IT_IS, may_be_empty: bool = False
) -> Iterator[Line]:
    """Each row of a data file, parsed and checked by itself.

    Args:
        path: the file: a table where it ends in ``.csv`` or ``.tsv``, an SQLite database where ``reading`` has a query,
            else JSONL.
        labelled: whether rows have labels; None asks of all rows what the first one has.
        reading: which rows, and how they are found.
        may_be_empty: whether a file without a row, or without one of the part that is read, is no error.

    Raises:
        DataError: the file is missing, empty or too long, or has no row of the part that is read; or a row is
            malformed, too long or without text.
    """
    rows = 0
    for line in _lines(path, labelled=labelled, reading=reading, may_be_empty=may_be_empty):
        rows += 1
        yield line
    if rows == 0 and not may_be_empty and not reading.includes_all:
        raise DataError(
            f"{path} has no row for {reading.part} with an evaluation_share of {reading.evaluation_share:g}; it needs "
            "at least one"
        )


def _lines(
    path: Path, *, labelled: bool | None, reading: Reading, may_be_empty: bool = False
) -> Iterator[Line]:
    """The rows of :func:`read_lines`; none at all is no error where only a part is read."""
    rows, like_first = 0, labelled is None
    for line in _checked(path, labelled, reading):
        rows += 1
        if rows > MAX_ROWS:
            raise DataError(f"{path} has more than {MAX_ROWS} rows; keep the most recent ones")
        if like_first and rows > 1 and labelled is not (line.label is not None):
            has = ("no label, and the first row has one", "a label, and the first row has none")
            raise DataError(f"{line.where} has {has[line.label is not None]}; give all rows one, or none")
        labelled = line.label is not None
        if reading.includes(line.text):
            yield line
    if rows == 0 and not may_be_empty:
        raise DataError(f"{path} is empty; it needs at least one row")


def _checked(path: Path, labelled: bool | None, reading: Reading) -> Iterator[Line]:
    """Each row of any kind of file, checked by itself."""
    if reading.function:
        from edge_runtime.data.functions import function_rows  # noqa: PLC0415 - the agent never has one

        rows: Iterator[TableRow] = function_rows(path, reading.function, reading.function_folder)
    elif reading.query:
        rows = query_rows(path, reading.query)
    elif path.suffix.lower() in SEPARATORS:
        rows = table_rows(path, MAX_ROW_BYTES)
    else:
        yield from _checked_json(path, labelled, reading)
        return
    for where, row in rows:
        yield _line(row, where, labelled, reading)


def _checked_json(path: Path, labelled: bool | None, reading: Reading) -> Iterator[Line]:
    """Each row of a JSONL file. A last line without its end that is no JSON is left out: somebody is writing it."""
    rows = 0
    for number, data in enumerate(_raw_lines(path), start=1):
        if number == 1:
            _refuse_other_formats(path, data)
            data = data.removeprefix(_BYTE_ORDER_MARK)  # noqa: PLW2901 - the mark is no part of the line
        if not data.strip():
            continue
        rows += 1
        if rows > 1 and not data.endswith(b"\n") and len(data) <= MAX_ROW_BYTES and not _is_json(data):
            return
        yield _parse(data, f"{path} line {number}", labelled, first=rows == 1, reading=reading)


def _is_json(data: bytes) -> bool:
    try:
        _DECODER.decode(data)
    except MALFORMED:
        return False
    return True


def read_each_row(file: BinaryIO, name: str) -> Iterator[tuple[int, Line | DataError]]:
    """Each row of an open file as it comes, with its line's number; a bad row is given as its error.

    Rows may have labels or not. There may be any number of them: only one is in memory at a time.

    Args:
        file: the JSONL file, or a pipe.
        name: what errors call it.

    Raises:
        DataError: the file is of another format.
    """
    number, rows = 0, 0
    while data := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            _refuse_other_formats(Path(name), data)
            data = data.removeprefix(_BYTE_ORDER_MARK)
        if not data.strip():
            continue
        rows += 1
        try:
            line: Line | DataError = _parse(data, f"{name} line {number}", None, first=rows == 1)
        except DataError as error:
            line = error
        yield number, line
        while len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):  # the rest of a line that is too long
            data = file.readline(MAX_ROW_BYTES + 1)


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_ROW_BYTES + 1):
                yield line
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error


def _refuse_other_formats(path: Path, data: bytes) -> None:
    if data.startswith(OTHER_FORMATS):
        from edge_runtime.data.diagnosis import other_format  # noqa: PLC0415 - rarely needed, memory counts

        raise DataError(f"{path} {other_format(data)}")


def _parse(
    data: bytes, where: str, labelled: bool | None, *, first: bool, reading: Reading = AS_IT_IS
) -> Line:
    if len(data) > MAX_ROW_BYTES:
        raise DataError(f"{where} has more than {MAX_ROW_BYTES} bytes; shorten or remove it")
    row = _object(data, where, labelled, first=first)
    return _line(row, where, labelled, reading)


def _line(row: dict[str, Any], where: str, labelled: bool | None, reading: Reading) -> Line:
    """A row's columns as text, label and the rest."""
    row = _renamed(row, reading)
    text = _text(row, where, labelled)
    if len(text.encode()) > MAX_ROW_BYTES:
        raise DataError(f"{where} has a text of more than {MAX_ROW_BYTES} bytes; shorten or remove it")
    label = _label(row, where, labelled)
    others = {name: value for name, value in row.items() if name not in (TEXT, LABEL)}
    if second := next((name for name in SECOND_TEXTS if name in others), None):
        raise DataError(
            f"{where} has a column {second!r} beside {TEXT!r}, and a row is one text: join the two into {TEXT!r}, or "
            f"remove {second!r}"
        )
    return Line(where, text, label, others)


def _renamed(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The row with the columns that are read under the names that all rows have; theirs, if there are any, go."""
    names = {reading.text_column: TEXT, reading.label_column: LABEL}
    if all(old == new for old, new in names.items()):
        return row
    taken = {new for old, new in names.items() if old != new}
    return {names.get(name, name): value for name, value in row.items() if name in names or name not in taken}


def _object(data: bytes, where: str, labelled: bool | None, *, first: bool) -> dict[str, Any]:
    """The row's JSON object; the library's own error may quote the row, so it is never chained."""
    try:
        row = _DECODER.decode(data)
    except MALFORMED:
        from edge_runtime.data.diagnosis import why_unreadable  # noqa: PLC0415 - rarely needed, memory counts

        raise DataError(f"{where} {why_unreadable(data, _FORMS[labelled], first=first)}") from None
    if isinstance(row, list):
        raise DataError(
            f"{where} is a JSON array; write each of its rows as a line of its own, without commas between them"
        )
    if not isinstance(row, dict):
        raise DataError(f"{where} is JSON, but no object; it must be {_FORMS[labelled]}")
    for name in (TEXT, LABEL):
        if data.count(f'"{name}"'.encode()) > 1 and _stands_twice(data, name):
            raise DataError(f"{where} has the column {name!r} twice; keep one of them")
    return row


def _stands_twice(data: bytes, name: str) -> bool:
    """Whether a key occurs more than once at the top of an object, of which parsers silently keep the last."""
    import json  # noqa: PLC0415 - rarely needed, and the worker's memory counts

    keys: list[list[str]] = []
    json.loads(data, object_pairs_hook=lambda pairs: keys.append([key for key, _ in pairs]))
    return keys[-1].count(name) > 1  # the outermost object ends last


def _text(row: dict[str, Any], where: str, labelled: bool | None) -> str:
    text = row.get(TEXT)
    if isinstance(text, str) and text.strip():
        return text
    if isinstance(text, str):
        raise DataError(f"{where} has an empty text; remove it")
    if TEXT in row:
        raise DataError(f"{where} has {_kind(text)} as its text; it must be a string")
    if several := next((name for name in SEVERAL_TEXTS if name in row), None):
        raise DataError(
            f"{where} has a column {several!r} and no {TEXT!r}, and a row is one text: write it as one, as the "
            "tokenizer's apply_chat_template does with tokenize=False"
        )
    synonym = next((name for name in TEXT_SYNONYMS if name in row), None)
    advice = f"rename the column {synonym!r} to {TEXT!r}" if synonym else f"it must be {_FORMS[labelled]}"
    raise DataError(f"{where} has no column {TEXT!r}; {advice}")


def _label(row: dict[str, Any], where: str, labelled: bool | None) -> str | int | None:
    label = row.get(LABEL)
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # what a table with missing numbers is written as
    if label is None:
        if not labelled:
            return None
        synonym = next((name for name in LABEL_SYNONYMS if name in row), None)
        advice = (
            f"rename the column {synonym!r} to {LABEL!r}" if synonym else "give it one, or remove the row"
        )
        raise DataError(f"{where} has no label; {advice}")
    if labelled is False:
        raise DataError(
            f"{where} has a label, and rows of language modelling have none; remove the column {LABEL!r}"
        )
    if isinstance(label, list):
        raise DataError(f"{where} has a list as its label; a row has one label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"{where} has {_kind(label)} as its label; it must be a string or a whole number")
    if isinstance(label, str) and len(label) > MAX_LABEL_CHARACTERS:
        raise DataError(f"{where} has a label of more than {MAX_LABEL_CHARACTERS} characters; shorten it")
    return label


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")
