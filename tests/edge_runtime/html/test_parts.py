"""The parts that pages are made of."""

from __future__ import annotations

import re

import pytest

from edge_runtime.html.parts import Row, document, facts, gauge, prose, table, tiles
from tests.edge_runtime.html.pages import assert_stands_alone, assert_well_formed, text_of

HOSTILE = '"><script>alert(1)</script>'


def test_a_document_stands_alone_and_escapes_its_title() -> None:
    """An empty page is a whole page, and a title cannot become part of its structure."""
    page = document(HOSTILE, "<p>nothing</p>")
    assert_stands_alone(page)
    assert_well_formed(page)


def test_numbers_stay_with_their_units() -> None:
    """A line is never broken between a number and its unit, nor within a time in words."""
    assert prose("3 min 14 s, 97.3 MiB, 24 % of 8 rows") == (
        "3\u00a0min 14\u00a0s, 97.3\u00a0MiB, 24\u00a0% of 8 rows"
    )


def test_a_card_names_its_figures() -> None:
    """Every cell carries its column's name, which a narrow screen shows instead of the header."""
    shown = table(
        "caption", ("round", "up", ""), [Row(("1", "2 MiB", "")), Row(("2", "", "late"))], numbers=(1,)
    )
    assert re.findall(r'data-name="([^"]*)">([^<]*)</td>', shown) == [
        ("up", "2 MiB"),
        ("", ""),
        ("up", ""),
        ("", "late"),
    ]
    assert '<th scope="col" class=n>up</th><td></td>' in shown
    assert_well_formed(document("", shown))


def test_names_and_values_are_escaped() -> None:
    """Facts, tiles and captions take plain text, whatever it holds."""
    page = document("", facts(HOSTILE, [(HOSTILE, HOSTILE)]) + tiles([(HOSTILE, HOSTILE, HOSTILE)]))
    assert "<script" not in page
    assert text_of(page).count(HOSTILE) == 6


@pytest.mark.parametrize(("peak", "within"), [(50, "50.00%"), (200, "50.00%")])
def test_a_bar_over_its_cap_is_hatched_beyond_it(peak: int, within: str) -> None:
    """The plain part of the bar ends at the cap, whatever the peak, and the figures are told in words too."""
    bar = gauge(100, peak, 90, 80)
    assert f'class="measured" x="0" y="6" width="{within}"' in bar
    assert (
        f'aria-label="{peak} bytes of 100 bytes, predicted 90 bytes, charged by the kernel 80 bytes"' in bar
    )
