"""Rows as people have them: tables and databases, columns of other names; and that an error never quotes a row."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from edge_runtime.data.reading import Reading
from edge_runtime.data.rows import MAX_ROW_BYTES, Row, check_rows, count_rows, load_rows
from edge_runtime.errors import DataError

LABELS = ("negative", "positive")
SECRET = "confidential"
TWO = [Row("fine film", 1), Row("bad, bad film", 0)]


def write(folder: Path, data: bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b'text,label\nfine film,positive\n"bad, bad film",negative\n'),
        ("a.CSV", b"text;label\nfine film;positive\nbad, bad film;negative\n"),
        ("a.tsv", b"text\tlabel\nfine film\tpositive\nbad, bad film\tnegative\n"),
        ("a.csv", b'\xef\xbb\xbflabel,id,text\r\npositive,7,fine film\r\nnegative,8,"bad, bad film"\r\n'),
        ("a.csv", b'text,label\nfine film,1\n\n"bad, bad film",0'),
        ("a.jsonl", b'{"text": "fine film", "label": 1}\n{"text": "bad, bad film", "label": 0}'),
    ],
)
def test_tables_are_read_by_their_header(tmp_path: Path, name: str, data: bytes) -> None:
    """Separators, quotes, a byte order mark, further columns, blank lines, positions as labels, any order."""
    path = write(tmp_path, data, name)
    assert load_rows(path, LABELS) == TWO
    assert count_rows(path) == check_rows(path).rows == 2


def test_a_field_may_go_on_in_the_next_line(tmp_path: Path) -> None:
    """Within quotes a line end is part of the text; the line after counts on."""
    path = write(tmp_path, b'text,label\n"fine\nfilm",positive\nx,other\n')
    with pytest.raises(DataError, match=r"data\.csv line 4 has a label outside the package's set"):
        load_rows(path, LABELS)
    assert check_rows(path).rows == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; its first line must name the columns"),
        (b"text,label\n", "is empty; it needs at least one row"),
        (b"text,text\na,b\n", "names a column twice in its first line"),
        (f"body,label\n{SECRET},positive\n".encode(), "rename the column 'body' to 'text'"),
        (f"text,label\n{SECRET},\n".encode(), "has no label"),
        (
            f"text,label\n{SECRET},positive,more\nb,c\n".encode(),
            "line 2 has 3 fields, and the header names 2",
        ),
        (f"text,label\n{SECRET}\nb,positive\n".encode(), "line 2 has 1 fields"),
        (f'text,label\n"{SECRET}"x,positive\n'.encode(), "is no row of a table"),
        (f"text,label\n{SECRET}".encode() + b"\xff,positive\n", "line 2 is not UTF-8"),
        (f"text,label\n{SECRET}".encode() + b"x" * MAX_ROW_BYTES + b",positive\n", "more than 1048576 bytes"),
        (f"text,label,premise\n{SECRET},positive,x\n".encode(), "has a column 'premise' beside 'text'"),
    ],
)
def test_what_is_no_row_is_told_by_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    """Each cause has one line with a cure, which quotes nothing of the row."""
    with pytest.raises(DataError, match=message) as refused:
        load_rows(write(tmp_path, data), LABELS)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_columns_of_other_names_are_read_under_theirs(tmp_path: Path) -> None:
    """``text_column`` and ``label_column`` name them, in tables and in JSONL; one called text is then none."""
    reading = Reading(text_column="body", label_column="topic")
    table = write(tmp_path, b"body,topic,text\nfine film,positive,other\n")
    lines = write(tmp_path, b'{"body": "fine film", "topic": "positive", "text": "other"}\n', "data.jsonl")
    assert load_rows(table, LABELS, reading) == load_rows(lines, LABELS, reading) == [Row("fine film", 1)]


@pytest.mark.parametrize(
    ("name", "whole", "begun"),
    [
        ("a.jsonl", b'{"text": "fine film", "label": 1}\n', b'{"text": "half a ro'),
        ("a.csv", b"text,label\nfine film,1\n", b"half a ro"),
    ],
)
def test_a_row_that_is_being_written_waits(tmp_path: Path, name: str, whole: bytes, begun: bytes) -> None:
    """A last line without its end is left out until it is whole; in the middle of a file it is an error."""
    path = write(tmp_path, whole + begun, name)
    assert load_rows(path, LABELS) == [Row("fine film", 1)]
    with pytest.raises(DataError):
        load_rows(write(tmp_path, whole + begun + b"\n" + whole, name), LABELS)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Messages with categories, as an application keeps them."""
    path = tmp_path / "mail 100%.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE messages (body TEXT, category TEXT, spam INTEGER)")
        rows = [("fine film", "positive", 1), ("bad, bad film", "negative", 0), (SECRET, None, 0)]
        connection.executemany("INSERT INTO messages VALUES (?, ?, ?)", rows)
        connection.commit()
    return path


def test_a_query_gives_rows(database: Path) -> None:
    """Names come from the query; labels may be numbers."""
    named = "SELECT body AS text, category AS label FROM messages WHERE category IS NOT NULL ORDER BY rowid"
    assert load_rows(database, LABELS, Reading(query=named)) == TWO
    numbered = "SELECT body AS text, spam AS label FROM messages WHERE category IS NOT NULL ORDER BY rowid"
    assert load_rows(database, LABELS, Reading(query=numbered)) == TWO
    assert count_rows(database, Reading(query=named)) == check_rows(database, Reading(query=named)).rows == 2
    assert load_rows(database, (), Reading(query="SELECT body AS text FROM messages LIMIT 1")) == [
        Row("fine film")
    ]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT body AS text, category AS label FROM messages", "row 3 of the query has no label"),
        ("SELECT body AS text, body AS text FROM messages", "names a column twice"),
        ("SELECT missing FROM messages", "does not answer data_query: no such column: missing"),
        ("DELETE FROM messages", "does not answer data_query: attempt to write a readonly database"),
        ("ATTACH '/tmp/other.db' AS other", "does not answer data_query: too many attached databases"),
        ("SELECT body AS text FROM messages; DROP TABLE messages", "does not answer data_query"),
        ("PRAGMA user_version = 5", "data_query .* gives no rows; it must be a SELECT|readonly"),
        ("SELECT x'00' AS text, 'positive' AS label", "must be a string"),
    ],
)
def test_a_query_that_is_none_changes_nothing(database: Path, query: str, message: str) -> None:
    """Whatever it is, one line tells why, no row is quoted, and the database is as it was."""
    before = database.read_bytes()
    with pytest.raises(DataError, match=message) as refused:
        load_rows(database, LABELS, Reading(query=query))
    assert SECRET not in str(refused.value)
    assert database.read_bytes() == before


def test_no_database_is_made(tmp_path: Path) -> None:
    """A path with nothing there is told, and nothing is there afterwards."""
    with pytest.raises(DataError, match="there is no such file"):
        load_rows(tmp_path / "none.db", LABELS, Reading(query="SELECT 1 AS text"))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_does_not_stop_a_reader(database: Path) -> None:
    """With another program's transaction open, what was committed before is read."""
    with closing(sqlite3.connect(database)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("INSERT INTO messages VALUES ('x', 'positive', 1)")
        query = (
            "SELECT body AS text, category AS label FROM messages WHERE category IS NOT NULL ORDER BY rowid"
        )
        assert load_rows(database, LABELS, Reading(query=query)) == TWO
