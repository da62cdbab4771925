import json
import re

import pytest

from benchmarks.harness.tables import NO_BREAK, TableError, main, quantity, table, with_tables

ROWS = [
    {
        "name": "Peak",
        "value": 120_500_000,
        "unit": "bytes",
        "reach": 155_000_000,
        "met": True,
        "low": 1e8,
        "high": 13e7,
    },
    {"name": "Step", "value": 0.25, "unit": "seconds", "reach": 0.2, "met": False, "low": 0.24, "high": 0.3},
    {"name": "Ratio", "value": 2.2, "unit": "times", "reach": None, "met": None, "low": 2.0, "high": 2.4},
]
README = "before\n\n<!-- table:figures -->\nold\n<!-- /table -->\n\nafter\n"


PICK = """
[[rows]]
label = "Peak, where a step takes {}"
result = "figures"
row = "Peak"
beside = ["Step"]
target = "bench"
page = "docs/memory.md"
"""
SELECTED = "before\n\n<!-- selection:chosen -->\nold\n<!-- /table -->\n\nafter\n"


@pytest.fixture
def selections(tmp_path):
    folder = tmp_path / "selections"
    folder.mkdir()
    (folder / "chosen.toml").write_text(PICK)
    return folder


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "figures.json").write_text(
        json.dumps({"command": "make bench", "commit": "ab" * 20, "rows": ROWS})
    )
    return folder


def test_a_table_shows_value_range_and_whether_the_aim_was_reached() -> None:
    """Every row stands in the table, missed aims with their true value and a plain no."""
    lines = table({"rows": ROWS}).splitlines()
    assert lines[0] == "|  | measured | range | to reach | reached |"
    assert lines[2] == "| Peak | 120.5 MB | 100.0 MB to 130.0 MB | ≤ 155.0 MB | yes |"
    assert lines[3] == "| Step | 250 ms | 240 ms to 300 ms | ≤ 200 ms | **no** |"
    assert lines[4] == "| Ratio | 2.20 × | 2.00 × to 2.40 × |  |  |"


def test_rows_without_range_and_aim_get_neither_column() -> None:
    """A result that only has names and values makes a table of two columns."""
    plain = {"rows": [{"name": "Devices", "value": 20, "unit": ""}]}
    assert table(plain).splitlines()[:3] == ["|  | measured |", "| --- | ---: |", "| Devices | 20 |"]


def test_a_table_says_where_its_figures_come_from(results) -> None:
    """Command and commit stand below the table, with a word on changes that were not committed."""
    document = json.loads((results / "figures.json").read_text())
    assert table(document).endswith("`make bench`; commit abababababab.")
    document["commit"] += "-dirty"
    assert table(document).endswith("commit abababababab with changes.")


def test_only_the_text_between_markers_changes(results) -> None:
    """Prose around a table stays as it is, and a second pass changes nothing."""
    made = with_tables(README, results)
    assert made.startswith("before\n\n<!-- table:figures -->\n| ")
    assert made.endswith("\n<!-- /table -->\n\nafter\n")
    assert "old" not in made
    assert with_tables(made, results) == made


def test_a_text_without_markers_stays_as_it_is(results) -> None:
    """Nothing is added to a file that asks for no table."""
    assert with_tables("no tables here\n", results) == "no tables here\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<!-- table:absent -->\n<!-- /table -->\n", "table absent"),
        ("<!-- table:rowless -->\n<!-- /table -->\n", "has no rows"),
        ("<!-- table:broken -->\n<!-- /table -->\n", "is not JSON"),
        ("<!-- table:figures -->\nno end\n", "<!-- /table -->"),
        ("<!-- table:figures -->\n<!-- table:figures -->\n<!-- /table -->\n", "its own"),
    ],
)
def test_a_table_that_cannot_be_made_is_named(results, text, named) -> None:
    """A missing, malformed or rowless result and an open marker each get an error that says which."""
    (results / "rowless.json").write_text("{}")
    (results / "broken.json").write_text("{")
    with pytest.raises(TableError, match=named):
        with_tables(text, results)


def test_a_selection_shows_single_rows_of_result_files(results, selections) -> None:
    """A picked row has its own label, another row's value in it, its aim, and a link to command and page."""
    (results / "others.json").write_text(json.dumps({"rows": ROWS[1:]}))
    (selections / "chosen.toml").write_text(
        PICK
        + '[[rows]]\nlabel = "Ratio"\nresult = "others"\nrow = "Ratio"\ntarget = "more"\npage = "more.md"\n'
    )
    made = with_tables(SELECTED, results, selections)
    assert made.startswith("before\n\n<!-- selection:chosen -->\n|  | measured | to reach | reached |")
    assert made.replace(NO_BREAK, " ").splitlines()[5:] == [
        "| Peak, where a step takes 250 ms | 120.5 MB | ≤ 155.0 MB | yes | [`make bench`](docs/memory.md) |",
        "| Ratio | 2.20 × |  |  | [`make more`](more.md) |",
        "<!-- /table -->",
        "",
        "after",
    ]
    assert f"≤{NO_BREAK}155.0{NO_BREAK}MB" in made
    assert with_tables(made, results, selections) == made


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('row = "Peak"', 'row = "Summit"', "figures.json has 0 rows named 'Summit'"),
        ('"Step"', '"Stride"', "figures.json has 0 rows named 'Stride'"),
        ('["Step"]', "[]", "needs one {} for each row"),
        ('"figures"', '"absent"', "table absent"),
        ("target", "goal", "chosen.toml"),
        ("[[rows]]", "[[rows", "chosen.toml"),
    ],
)
def test_a_selection_that_cannot_be_made_is_named(results, selections, old, new, named) -> None:
    """A row that is not there, a label without room for it and a malformed file each get an error that says which."""
    (selections / "chosen.toml").write_text(PICK.replace(old, new))
    with pytest.raises(TableError, match=re.escape(named)):
        with_tables(SELECTED, results, selections)


def test_a_name_that_two_rows_share_cannot_be_picked(results, selections) -> None:
    """Which of two rows of one name is meant cannot be told, so neither is shown."""
    (results / "figures.json").write_text(json.dumps({"rows": [*ROWS, ROWS[0]]}))
    with pytest.raises(TableError, match="2 rows named 'Peak'"):
        with_tables(SELECTED, results, selections)


def test_a_missing_selection_is_named(results, selections) -> None:
    """A marker without its file gets an error with the file's path."""
    (selections / "chosen.toml").unlink()
    with pytest.raises(TableError, match=re.escape("chosen.toml")):
        with_tables(SELECTED, results, selections)


def test_check_reports_an_outdated_file_and_changes_nothing(tmp_path, results, capsys) -> None:
    """--check exits with 1 and a hint while the file is out of date, and with 0 once it is not."""
    readme = tmp_path / "README.md"
    readme.write_text(README)
    arguments = [str(readme), "--results", str(results)]
    assert main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert readme.read_text() == README
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0


def test_a_missing_file_is_an_error_of_its_own(tmp_path, results, capsys) -> None:
    """A file that cannot be read exits with 2, so that it is not mistaken for an outdated one."""
    assert main([str(tmp_path / "absent.md"), "--results", str(results)]) == 2
    assert "absent.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (934_000_000, "bytes", "934.0 MB"),
        (0.0894, "seconds", "89 ms"),
        (2.5, "seconds", "2.50 s"),
        (0.1284, "times", "0.13 ×"),
        (1000, "rows", "1,000 rows"),
    ],
)
def test_quantities_read_as_people_write_them(value, unit, text) -> None:
    """Each unit has one form in all tables."""
    assert quantity(value, unit) == text
