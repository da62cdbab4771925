"""The pages with measured figures: README and docs/results."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from benchmarks.harness.result_file import RESULTS
from benchmarks.harness.tables import OPENING, SELECTIONS, Pick, Selection, with_tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PICKS = msgspec.toml.decode((SELECTIONS / "readme.toml").read_bytes(), type=Selection).rows


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page: Path) -> None:
    """`make tables` would change nothing."""
    text = page.read_text("utf-8")
    assert with_tables(text, RESULTS) == text


def test_every_table_is_on_a_page_that_make_tables_fills() -> None:
    """Markers of tables stand in the README and in docs/results alone, which is what the Makefile lists."""
    elsewhere = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")}
    elsewhere -= {README, *PAGES}
    assert not [page for page in sorted(elsewhere) if OPENING.search(page.read_text("utf-8"))]
    assert "PAGES := README.md $(wildcard docs/results/*.md)\n" in (ROOT / "Makefile").read_text()


def test_every_result_file_has_one_table() -> None:
    """All rows of each result file stand on exactly one page of docs/results."""
    shown = [name for page in PAGES for name in re.findall(r"<!-- table:(\S+) -->", page.read_text("utf-8"))]
    assert sorted(shown) == sorted(path.stem for path in RESULTS.glob("*.json"))


def test_every_selection_is_shown() -> None:
    """Each file of picked rows has its table in the README."""
    shown = re.findall(r"<!-- selection:(\S+) -->", README.read_text("utf-8"))
    assert sorted(shown) == sorted(path.stem for path in SELECTIONS.glob("*.toml"))


@pytest.mark.parametrize("pick", PICKS, ids=lambda pick: pick.row)
def test_a_picked_row_leads_to_its_command_and_to_all_rows(pick: Pick) -> None:
    """The make target exists, and the linked page has the whole table and names the target."""
    page = (ROOT / pick.page).read_text("utf-8")
    assert pick.target in TARGETS
    assert f"<!-- table:{pick.result} -->" in page
    assert f"`make {pick.target}`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_make_targets_that_exist(page: Path) -> None:
    """Every result page names at least one make target, and no other than the Makefile's."""
    named = set(re.findall(r"`make ([a-z-]+)", page.read_text("utf-8")))
    assert named
    assert named <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every file that a result page links to exists."""
    linked = re.findall(r"\]\(([^)#:]+)", page.read_text("utf-8"))
    assert not [name for name in linked if not (page.parent / name).exists()]


def test_the_index_lists_every_page() -> None:
    """docs/results/index.md links to each of its neighbours."""
    linked = re.findall(
        r"^\| \[[^]]+\]\(([a-z-]+\.md)\)", PAGES[0].with_name("index.md").read_text("utf-8"), re.M
    )
    assert sorted(linked) == [page.name for page in PAGES if page.name != "index.md"]
