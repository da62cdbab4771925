"""Rows as people write them: what is read, what is refused, and that an error never quotes a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data.rows import MAX_ROW_BYTES, Row, RowsSummary, check_rows, count_rows, load_rows
from edge_runtime.errors import DataError

LABELS = ("negative", "positive")
GOOD = b'{"text": "fine film", "label": "positive"}\n'
QUOTED = "confidential"


def write(folder: Path, data: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    return path


def test_rows_carry_label_indices(tmp_path) -> None:
    """Labels become positions in the package's label set; the last newline may be missing."""
    path = write(tmp_path, GOOD + b'{"label": "negative", "text": "bad film"}')
    assert load_rows(path, LABELS) == [Row("fine film", 1), Row("bad film", 0)]
    assert count_rows(path) == check_rows(path).rows == 2


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + GOOD + GOOD, id="byte order mark"),
        pytest.param(GOOD + b"\n" + GOOD, id="blank line in the middle"),
        pytest.param(GOOD + GOOD + b"\n\n", id="blank lines at the end"),
        pytest.param(b"\n  \t\n" + GOOD + GOOD, id="blank lines at the beginning"),
        pytest.param(b"\xef\xbb\xbf\n" + GOOD + GOOD, id="a mark on a line of its own"),
        pytest.param((GOOD + GOOD).replace(b"\n", b"\r\n"), id="carriage returns"),
        pytest.param(
            b'{"id": 7, "text": "fine film", "label": "positive", "meta": {"label": "x"}}\n' + GOOD,
            id="further columns",
        ),
        pytest.param(
            b'{"text": "fine film", "label": 1}\n{"text": "fine film", "label": 1.0}\n',
            id="positions as labels",
        ),
    ],
)
def test_what_can_mean_one_thing_only_is_read(tmp_path, data: bytes) -> None:
    """A byte order mark, blank lines, further columns and whole numbers as labels are read, and counted alike."""
    path = write(tmp_path, data)
    assert load_rows(path, LABELS) == [Row("fine film", 1)] * 2
    assert count_rows(path) == check_rows(path).rows == 2


def test_numbers_name_labels_that_are_numbers(tmp_path) -> None:
    """Where the label set has numbers for names, a whole number is a name and no position."""
    path = write(tmp_path, b'{"text": "a", "label": 3}\n{"text": "b", "label": "1"}\n')
    assert load_rows(path, ("3", "1")) == [Row("a", 0), Row("b", 1)]


def test_what_is_not_used_is_told(tmp_path) -> None:
    """A summary counts columns that nothing reads and says how numbers are read; a plain file has no note."""
    path = write(tmp_path, b'{"idx": 1, "text": "a", "label": 0}\n{"src": "b", "text": "b", "label": 1}\n')
    summary = check_rows(path)
    assert summary == RowsSummary(rows=2, labelled=True, numbered=True, unused_columns=2)
    assert summary.note == (
        "labels are whole numbers, read as the package's labels of that name or position; "
        "2 columns beside text and label are not used"
    )
    assert check_rows(write(tmp_path, GOOD)).note == ""


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"confidential", "is not JSON; it must be an object"),
        (b'["confidential"]', "is a JSON array"),
        (b'"confidential"', "is JSON, but no object"),
        (b'{"text": "confidential"}', "has no label; give it one"),
        (b'{"text": "confidential", "label": null}', "has no label; give it one"),
        (
            b'{"text": "confidential", "intent": "positive"}',
            "has no label; rename the column 'intent' to 'label'",
        ),
        (b'{"text": "confidential", "label": 2}', "outside 0 to 1, the positions of the package's 2 labels"),
        (b'{"text": "confidential", "label": -1}', "outside 0 to 1"),
        (b'{"text": "confidential", "label": 0.5}', "has a number as its label"),
        (b'{"text": "confidential", "label": true}', "has true or false as its label"),
        (b'{"text": "confidential", "label": ["positive"]}', "a row has one label"),
        (b'{"text": "confidential", "label": {"a": 1}}', "has an object as its label"),
        (b'{"text": "confidential", "label": "' + b"x" * 2001 + b'"}', "more than 2000 characters"),
        (b'{"text": "confidential \xff", "label": "positive"}', "is not UTF-8 (byte 24 of the line)"),
        (b'{"text": "confidential \\ud83d", "label": "positive"}', "half of a surrogate pair"),
        (b'{"text": "", "label": "positive"}', "empty text"),
        (b'{"text": "  ", "label": "positive"}', "empty text"),
        (b'{"text": null, "label": "positive"}', "has null as its text; it must be a string"),
        (b'{"text": 7, "label": "positive"}', "has a number as its text"),
        (b'{"sentence": "confidential", "label": "positive"}', "rename the column 'sentence' to 'text'"),
        (b'{"confidential": 1, "label": "positive"}', "has no column 'text'; it must be"),
        (b'{"text": "a", "text": "confidential", "label": "positive"}', "has the column 'text' twice"),
        (
            b'{"text": "a", "text_pair": "confidential", "label": "positive"}',
            "has a column 'text_pair' beside 'text'",
        ),
        (
            b'{"text": "confidential", "label": "confidential"}',
            "label outside the package's set of 2; correct",
        ),
        (
            b'{"text": "confidential", "label": " Positive"}',
            "differs from one of them in spaces or capitals alone",
        ),
        (b'{"text": "' + b"x" * MAX_ROW_BYTES + b'", "label": "positive"}', str(MAX_ROW_BYTES)),
        (b"{'text': 'confidential', 'label': 'positive'}", "single quotes where JSON has double ones"),
        (b'{"text": "confidential", "label": "positive"},', "is part of a JSON array"),
        (b"{", "goes on in the next line"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_line_and_never_quoted(tmp_path, row: bytes, why: str) -> None:
    """The error has file, line number, cause and cure, and nothing from the row, in its causes neither."""
    path = write(tmp_path, GOOD + row + b"\n" + GOOD)
    with pytest.raises(DataError, match=r"data\.jsonl line 2 ") as caught:
        load_rows(path, LABELS)
    assert why in str(caught.value)
    assert QUOTED not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (
            b'{"text": "a", "label": "x"}\n',
            b'{"text": "b"}\n',
            "line 2 has no label, and the first row has one",
        ),
        (
            b'{"text": "a"}\n',
            b'{"text": "b", "label": "x"}\n',
            "line 2 has a label, and the first row has none",
        ),
    ],
)
def test_rows_are_alike(tmp_path, first: bytes, second: bytes, why: str) -> None:
    """Without a package to ask, all rows must have labels or none, as the first one does."""
    with pytest.raises(DataError, match=why):
        check_rows(write(tmp_path, first + second))


def test_a_label_is_one_too_much_for_language_modelling(tmp_path) -> None:
    """Rows of a language model have no labels; an explicit null is none."""
    assert load_rows(write(tmp_path, b'{"text": "a", "label": null}\n'), ()) == [Row("a")]
    with pytest.raises(DataError, match="line 1 has a label, and rows of language modelling have none"):
        load_rows(write(tmp_path, GOOD), ())


@pytest.mark.parametrize("read", [count_rows, check_rows])
def test_a_missing_file_is_named(tmp_path, read) -> None:
    """A data path that leads nowhere is a DataError."""
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_comes_back_as_it_was(tmp_path_factory, texts: list[str]) -> None:
    """Text survives, newlines and all, and counting agrees with parsing."""
    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": "positive"}) + "\n" for t in texts))
    assert [row.text for row in load_rows(path, LABELS)] == texts
    assert count_rows(path) == len(texts)


@given(
    st.lists(st.sampled_from([b"", b"  ", b"\t", GOOD.strip()]), max_size=40), st.booleans(), st.booleans()
)
def test_counting_agrees_with_parsing(tmp_path_factory, lines: list[bytes], mark: bool, ended: bool) -> None:
    """However rows and blank lines follow each other, counting gives the rows that parsing gives."""
    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + b"\n".join(lines) + b"\n" * ended)
    assert count_rows(path) == (check_rows(path).rows if GOOD.strip() in lines else 0)
