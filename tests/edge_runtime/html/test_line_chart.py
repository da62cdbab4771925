"""Curves over rounds."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.html.line_chart import NARROW, WIDE, Line, line_chart

ACCURACY = Line("this run", ((0, 0.015), (4, 0.574), (8, 0.8)))


def test_a_chart_is_told_in_words_for_both_screens() -> None:
    """There is a wide and a narrow drawing, each described by the first and the last value of every line."""
    drawings = line_chart("score", "accuracy", [ACCURACY, Line("other", ())], height=300, percent=True)
    assert re.findall(r'viewBox="0 0 (\d+) 300"', drawings) == [str(WIDE), str(NARROW)]
    assert drawings.count("this run: 1.5 % at 0, 80 % at 8") == 2


def test_nothing_measured_is_nothing_drawn() -> None:
    """Without a point there is no drawing."""
    assert line_chart("score", "accuracy", [Line("this run", ())], height=300) == ""


def test_rounds_are_whole_numbers() -> None:
    """A run of one round has no fractions of rounds on its axis."""
    drawings = line_chart("loss", "loss", [Line("loss", ((0, 4.3), (1, 4.2)))], height=240)
    narrow = drawings[drawings.index('viewBox="0 0 340') :]
    texts = re.findall(r'middle" x="[0-9.]+" y="213.0">([^<]*)<', narrow)
    assert [text for text in texts if text] == ["0"]
    assert ">1</text>" in narrow


@pytest.mark.parametrize("percent", [True, False])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_every_point_lies_on_the_drawing(percent: bool, values: list[float]) -> None:
    """Whatever the values, no dot and no line of the axes leaves the frame."""
    line = Line("this run", tuple(enumerate(values)))
    drawings = line_chart("score", "score", [line], height=300, percent=percent)
    for drawing in ET.fromstring(f"<page>{drawings}</page>"):  # noqa: S314 - made by ourselves a line above
        _, _, wide, high = map(float, drawing.attrib["viewBox"].split())
        for element in drawing.iter():
            for name, most in (
                ("x", wide),
                ("x1", wide),
                ("x2", wide),
                ("cx", wide),
                ("y", high),
                ("cy", high),
            ):
                assert 0 <= float(element.attrib.get(name, 0)) <= most
