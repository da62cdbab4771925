"""Rows that a function of the operator's own gives: checked like a file's, one at a time; errors quote nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.data.reading import Reading
from edge_runtime.data.rows import MAX_ROWS, count_rows, load_rows, read_lines
from edge_runtime.errors import DataError

SECRET = "zebrafish-4471"
MODULE = f'''
"""Rows as an operator might read them."""

closed = []


def read(path):
    for line in path.read_text().splitlines():
        yield {{"text": line, "label": "good", "at": 3}}


class Source:
    @staticmethod
    def rows(path):
        return [{{"text": "a"}}, {{"text": "b"}}]


def fails(path):
    yield {{"text": "a"}}
    raise ValueError("{SECRET}")


def wrong(path):
    yield "{SECRET}"


def none(path):
    return []


def endless(path):
    while True:
        yield {{"text": "a"}}


def nothing(path):
    return None


number = 7
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a module of functions."""
    (tmp_path / "own_rows_of_mine.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("own_rows_of_mine", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def reading(folder: Path, name: str, **more: object) -> Reading:
    """How rows of a function are read."""
    return Reading(function=f"own_rows_of_mine:{name}", function_folder=str(folder), **more)


def test_rows_come_from_the_function(folder: Path) -> None:
    """It is called with the path, and its rows have labels and parts as a file's have."""
    data = folder / "notes.txt"
    data.write_text("fine\nwell\ndull\n")
    rows = load_rows(data, ["good", "bad"], reading(folder, "read"))
    assert [(row.text, row.label) for row in rows] == [("fine", 0), ("well", 0), ("dull", 0)]
    assert count_rows(data, reading(folder, "read")) == 3
    parts = [
        count_rows(data, reading(folder, "read", part=part, evaluation_share=0.5, split_key="ab" * 16))
        for part in ("train", "evaluation")
    ]
    assert sum(parts) == 3
    assert [
        line.text for line in read_lines(data, labelled=None, reading=reading(folder, "Source.rows"))
    ] == [*("a", "b")]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fails", "own_rows_of_mine:fails raised ValueError; call it by hand"),
        ("wrong", "row 1 of own_rows_of_mine:wrong is no mapping"),
        ("none", "is empty; it needs at least one row"),
        ("nothing", "raised TypeError"),
        ("number", "is no function"),
        ("missing", "cannot be found (AttributeError)"),
        ("endless", f"has more than {MAX_ROWS} rows"),
    ],
)
def test_what_gives_no_rows_is_told_in_one_line(folder: Path, name: str, told: str, monkeypatch) -> None:
    """Each names the function and the cause; nothing of a row is quoted, and no number of rows is endless."""
    if name == "endless":
        monkeypatch.setattr("edge_runtime.data.rows.MAX_ROWS", 10)
        told = "has more than 10 rows"
    with pytest.raises(DataError) as caught:
        list(read_lines(folder, labelled=None, reading=reading(folder, name)))
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None or SECRET not in str(caught.value.__cause__)


def test_a_module_that_is_not_there(folder: Path) -> None:
    """The line says where it must lie."""
    with pytest.raises(DataError, match=r"cannot be found \(ModuleNotFoundError\).*function_folder"):
        count_rows(folder, Reading(function="no_such_module_here:read", function_folder=str(folder)))
