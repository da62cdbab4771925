"""Rows of tables: CSV and TSV files with a header, and queries of SQLite databases. One row is in memory at a time.

Errors never quote a value. They may quote a query, which is part of the device's configuration.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edge_runtime.errors import DataError

#: Endings of files that are tables, and what separates their fields; None: what the header has most of.
SEPARATORS: dict[str, str | None] = {".csv": None, ".tsv": "\t"}
_CANDIDATES = ",;\t|"
#: How long a database may be locked by whoever writes to it.
LOCK_TIMEOUT_S = 5.0
#: A row's words for errors, and its values by column.
TableRow = tuple[str, dict[str, Any]]


def table_rows(path: Path, max_row_bytes: int) -> Iterator[TableRow]:
    """Rows of a CSV or TSV file.

    Whole numbers are given as numbers, so that labels may be positions. A last line without its end that has too few
    fields is left out: somebody is writing it.

    Args:
        path: the file; its first line names the columns.
        max_row_bytes: size of the largest line.

    Raises:
        DataError: the file cannot be read, a line is too long or no UTF-8, or a row has another number of fields.
    """
    csv.field_size_limit(max_row_bytes)
    try:
        with path.open("rb") as file:
            lines = _Lines(file, path, max_row_bytes)
            first = next(lines, "")
            separator = SEPARATORS[path.suffix.lower()] or max(_CANDIDATES, key=first.count)
            header = next(csv.reader([first], delimiter=separator), [])
            _check_header(path, header)
            reader = csv.reader(lines, delimiter=separator, strict=True)
            for fields in _records(reader, path):
                where = f"{path} line {lines.number}"
                if not fields:
                    continue
                if len(fields) < len(header) and lines.unfinished:
                    return
                if len(fields) != len(header):
                    raise DataError(
                        f"{where} has {len(fields)} fields, and the header names {len(header)} columns; put fields "
                        "that hold separators or line ends in double quotes"
                    )
                yield where, {name: _value(field) for name, field in zip(header, fields, strict=True)}
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error


class _Lines(Iterator[str]):
    """Decoded lines of a bounded length, counted."""

    def __init__(self, file: Any, path: Path, max_bytes: int) -> None:
        self._file, self._path, self._max_bytes = file, path, max_bytes
        self.number = 0
        self.unfinished = False

    def __next__(self) -> str:
        data: bytes = self._file.readline(self._max_bytes + 1)
        if not data:
            raise StopIteration
        self.number += 1
        self.unfinished = not data.endswith(b"\n")
        if len(data) > self._max_bytes:
            raise DataError(
                f"{self._path} line {self.number} has more than {self._max_bytes} bytes; shorten or remove it"
            )
        try:
            return data.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path} line {self.number} is not UTF-8 (byte {error.start + 1} of the line); save the file as "
                "UTF-8, or convert it from its encoding: iconv -f LATIN1 -t UTF-8"
            ) from None


def _records(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error:
        raise DataError(
            f"{path} line {reader.line_num + 1} is no row of a table; a field that holds double quotes needs them "
            "doubled, and quotes around it"
        ) from None


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise DataError(f"{path} is empty; its first line must name the columns")
    if len(set(header)) < len(header):
        raise DataError(f"{path} names a column twice in its first line; rename one of them")


def _value(field: str) -> str | int | None:
    """A field's value: a whole number as one, an empty field as none."""
    if field.isascii() and field.removeprefix("-").isdigit() and str(int(field)) == field:
        return int(field)
    return field or None


def query_rows(path: Path, query: str) -> Iterator[TableRow]:
    """Rows that a query of an SQLite database gives. The database is opened for reading alone.

    Raises:
        DataError: the database cannot be opened, is locked for long, or refuses the query.
    """
    import sqlite3  # noqa: PLC0415 - a megabyte, for devices that have a database alone

    if not path.is_file():
        raise DataError(f"cannot read the data file {path}: there is no such file")
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=LOCK_TIMEOUT_S)
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        cursor = connection.execute(query)
        if cursor.description is None:
            raise DataError(f"data_query of {path} gives no rows; it must be a SELECT")
        names = [column[0] for column in cursor.description]
        if len(set(names)) < len(names):
            raise DataError(
                f"data_query of {path} names a column twice; give one of them another name with AS"
            )
        for number, values in enumerate(cursor, start=1):
            yield f"{path} row {number} of the query", dict(zip(names, values, strict=True))
    except sqlite3.Error as error:
        raise DataError(
            f"{path} does not answer data_query: {error}; try it with sqlite3, where another program holds the "
            "database locked try again later"
        ) from error
    finally:
        connection.close()
