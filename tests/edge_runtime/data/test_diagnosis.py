"""Files that are no JSONL: each is told by what it is, and the ways out that errors name work."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edge_runtime.data.rows import Row, load_rows
from edge_runtime.errors import DataError

LABELS = ("negative", "positive")
GOOD = b'{"text": "fine film", "label": "positive"}\n'


def write(folder: Path, data: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"text,label\nfine film,positive\n", "line 1 is not JSON; it looks like a comma-separated table"),
        (b"text\tlabel\nfine film\tpositive\n", "line 1 is not JSON; it looks like a tab-separated table"),
        (
            b"text;label\nfine film;positive\n",
            "line 1 is not JSON; it looks like a semicolon-separated table",
        ),
        (b"[\n" + GOOD + b"]\n", "line 1 opens a JSON value that goes on in the next line"),
        (
            "\ufeff".encode("utf-16-le") + GOOD.decode().encode("utf-16-le"),
            "is UTF-16, not UTF-8; convert it: iconv",
        ),
        (b"\x1f\x8b\x08\x00", "is compressed by gzip; unpack it: gunzip"),
        (b"PK\x03\x04", "is a ZIP archive or a spreadsheet"),
        (b"PAR1", "is a Parquet file"),
        (b"SQLite format 3\x00", "is an SQLite database"),
        (b"", "is empty; it needs at least one row"),
        (b"\n\n", "is empty; it needs at least one row"),
    ],
)
def test_another_format_is_named(tmp_path, data: bytes, why: str) -> None:
    """A file that is no JSONL at all is refused with what it is and what to do."""
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, data), LABELS)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "command"), [("latin1", "iconv -f LATIN1 -t UTF-8"), ("utf-16", "iconv -f UTF-16 -t UTF-8")]
)
def test_the_way_out_of_another_encoding_works(tmp_path, encoding: str, command: str) -> None:
    """The command that the error names makes the file readable, with the characters that were meant."""
    path = write(tmp_path, '{"text": "déjà vu", "label": "positive"}\n'.encode(encoding))
    with pytest.raises(DataError, match=command):
        load_rows(path, LABELS)
    done = subprocess.run([*command.split(), path], capture_output=True, check=True)
    path.write_bytes(done.stdout)
    assert load_rows(path, LABELS) == [Row("déjà vu", 1)]
