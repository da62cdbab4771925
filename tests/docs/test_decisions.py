"""The decision pages: one page each, with status and date, all listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "decisions"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))
#: The longest that is still read in one go.
LINES = 70


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_decision_is_one_page_with_status_and_date(page: Path) -> None:
    """A page's number is its title's, status and date follow, and it is short enough for one page."""
    lines = page.read_text("utf-8").splitlines()
    assert lines[0].startswith(f"# {int(page.name[:4])}. ")
    assert re.fullmatch(r"Status: (accepted|superseded by \d+)", lines[2])
    assert re.fullmatch(r"Date: \d{4}-\d\d-\d\d", lines[4])
    assert len(lines) <= LINES


def test_the_index_lists_every_decision_in_order() -> None:
    """docs/decisions/index.md has one line for each page, under the page's number."""
    listed = re.findall(
        r"^(\d+)\. \[[^]]+\]\(([^)]+)\): .+\.$", (FOLDER / "index.md").read_text("utf-8"), re.MULTILINE
    )
    assert listed == [(str(int(page.name[:4])), page.name) for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, FOLDER / "index.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every file that a decision links to, or names as a neighbour, exists."""
    text = page.read_text("utf-8")
    named = {*re.findall(r"\]\(([^)#:]+)", text), *re.findall(r"\b\d{4}-[a-z-]+\.md", text)}
    assert not [name for name in sorted(named) if not (page.parent / name).exists()]
