"""Rows to train on and rows to check on: apart, for good, and by a key of the device's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.data.reading import Reading
from edge_runtime.data.rows import count_rows, load_rows
from edge_runtime.errors import DataError

KEY, OTHER = "11" * 32, "22" * 32
#: The first rows that KEY keeps for evaluation at a share of 0.25, recorded when the split was written.
GOLDEN = ["row 2", "row 3", "row 14", "row 18", "row 23"]


def texts(path: Path, part: str, share: float = 0.25, key: str = KEY) -> list[str]:
    """Texts of a part."""
    return [
        row.text for row in load_rows(path, (), Reading(part=part, evaluation_share=share, split_key=key))
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four hundred rows, some of them twice."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "row {i % 390}"}}\n' for i in range(400)))
    return path


def test_every_row_is_on_one_side(data: Path) -> None:
    """Both parts together are all rows, copies are on one side, and the share is met within chance."""
    train, evaluation = texts(data, "train"), texts(data, "evaluation")
    assert sorted(train + evaluation) == sorted(texts(data, "all"))
    assert not set(train) & set(evaluation)
    assert 0.25 * 400 - 40 < len(evaluation) < 0.25 * 400 + 40
    reading = Reading(part="train", evaluation_share=0.25, split_key=KEY)
    assert count_rows(data, reading) == len(train)


def test_a_row_keeps_its_side_as_the_file_grows(data: Path) -> None:
    """What was checked on before is never trained on later; a larger share only takes rows from training."""
    before = set(texts(data, "evaluation"))
    data.write_text('{"text": "a new first row"}\n' + data.read_text() + '{"text": "and a last one"}\n')
    assert before <= set(texts(data, "evaluation"))
    assert before <= set(texts(data, "evaluation", share=0.5))


def test_another_device_keeps_other_rows(data: Path) -> None:
    """The key decides; the same key decides the same, on every machine."""
    assert texts(data, "evaluation", key=OTHER) != texts(data, "evaluation")
    assert texts(data, "evaluation")[:5] == GOLDEN


def test_without_a_share_every_part_is_all(data: Path) -> None:
    """Then a device checks with the rows that it trains on."""
    assert texts(data, "evaluation", share=0.0) == texts(data, "train", share=0.0) == texts(data, "all")


def test_a_part_without_rows_is_told(tmp_path: Path) -> None:
    """Loading it says which key of the configuration it is; counting it gives none."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "row 1"}\n')
    reading = Reading(part="evaluation", evaluation_share=0.25, split_key=KEY)
    assert count_rows(path, reading) == 0
    with pytest.raises(DataError, match=r"has no row for evaluation with an evaluation_share of 0\.25"):
        load_rows(path, (), reading)
