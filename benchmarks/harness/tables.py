"""Tables of the pages, made from result files: ``python -m benchmarks.harness.tables README.md [--check]``.

Between ``<!-- table:NAME -->`` and ``<!-- /table -->`` stand all rows of ``benchmarks/results/NAME.json``, any result
file that has ``rows`` of name, value and unit, with or without a value to reach.

Between ``<!-- selection:NAME -->`` and ``<!-- /table -->`` stand single rows of several result files, those that
``benchmarks/selections/NAME.toml`` lists (:class:`Pick`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness.result_file import RESULTS

SELECTIONS = RESULTS.parent / "selections"
END = "<!-- /table -->"
NO_BREAK = "\N{NO-BREAK SPACE}"
MARKED = re.compile(
    r"<!-- (?P<kind>table|selection):(?P<name>[A-Za-z0-9._-]+) -->\n(?P<body>.*?)" + re.escape(END), re.DOTALL
)
OPENING = re.compile(r"<!-- (?:table|selection):")


class TableError(Exception):
    """A table cannot be made; the message names marker or file."""


class Pick(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of a selection.

    Attributes:
        result: name of the result file, without its ending.
        row: name of the row in that file.
        label: what stands in the table in place of that name; each ``{}`` in it becomes the value of another row.
        target: the make target that measures them.
        page: where all rows of the result stand, as the selection's page links to it.
        beside: names of the other rows, in the same file, one for each ``{}``.
    """

    result: str
    row: str
    label: str
    target: str
    page: str
    beside: list[str] = []


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file in ``benchmarks/selections`` says: the rows of one table, in order."""

    rows: list[Pick]


def main(argv: list[str] | None = None) -> int:
    """Rewrite the file, or with ``--check`` only say whether it is up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--selections", type=Path, default=SELECTIONS, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.file.read_text(encoding="utf-8")
        wanted = with_tables(text, arguments.results, arguments.selections)
    except (OSError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if text == wanted:
        return 0
    if arguments.check:
        print(
            f"{arguments.file} is out of date; run 'python -m benchmarks.harness.tables {arguments.file}'",
            file=sys.stderr,
        )
        return 1
    arguments.file.write_text(wanted, encoding="utf-8")
    return 0


def with_tables(text: str, results: Path, selections: Path = SELECTIONS) -> str:
    """``text`` with the table between every pair of markers made anew.

    Raises:
        TableError: a marker is not closed, its file is missing or malformed, or a row that it picks is.
    """
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise TableError(f"every '<!-- table:NAME -->' needs its own '{END}', and a line break after it")

    def made(found: re.Match[str]) -> str:
        kind, name = found["kind"], found["name"]
        body = table(_result(name, results)) if kind == "table" else _selected(name, results, selections)
        return f"<!-- {kind}:{name} -->\n{body}\n{END}"

    return MARKED.sub(made, text)


def table(document: Mapping[str, Any]) -> str:
    """A result's rows as a Markdown table, with its conditions below."""
    rows: list[Mapping[str, Any]] = document["rows"]
    spread = any("low" in row for row in rows)
    reach = any(row.get("reach") is not None for row in rows)
    header = ["", "measured", *["range"] * spread, *["to reach", "reached"] * reach]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in rows:
        unit = row["unit"]
        cells = [row["name"], quantity(row["value"], unit)]
        if spread:
            cells.append(
                f"{quantity(row['low'], unit)} to {quantity(row['high'], unit)}" if "low" in row else ""
            )
        lines.append(_line([*cells, *_reached(row) * reach]))
    return "\n".join([*lines, "", _conditions(document)])


def quantity(value: float, unit: str) -> str:
    """A value as people read it: 1 MB is 10⁶ bytes."""
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if unit == "seconds":
        return f"{value * 1e3:,.0f} ms" if value < 1 else f"{value:,.2f} s"
    if unit == "times":
        return f"{value:.2f} ×"
    return f"{value:,} {unit}".rstrip()


def _selected(name: str, results: Path, selections: Path) -> str:
    """The rows that a selection picks, each with its make target and the page of all rows."""
    path = selections / f"{name}.toml"
    try:
        picks = msgspec.toml.decode(path.read_bytes(), type=Selection).rows
    except OSError as error:
        raise TableError(f"selection {name}: cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise TableError(f"selection {name}: {path}: {error}") from error
    header = ["", "measured", "to reach", "reached", "command and page"]
    lines = [_line(header), _line(["---", "---:", "---:", "---:", "---"])]
    for pick in picks:
        row = _picked(pick.row, pick.result, results)
        if pick.label.count("{}") != len(pick.beside):
            raise TableError(f"selection {name}: '{pick.label}' needs one {{}} for each row beside it")
        label = pick.label
        for other in (_picked(beside, pick.result, results) for beside in pick.beside):
            label = label.replace("{}", _unbroken(quantity(other["value"], other["unit"])), 1)
        link = f"[`make {pick.target}`]({pick.page})"
        figures = [quantity(row["value"], row["unit"]), *_reached(row)]
        lines.append(_line([label, *map(_unbroken, figures), link]))
    return "\n".join(lines)


def _unbroken(text: str) -> str:
    """A figure that stays on one line beside a long label."""
    return text.replace(" ", NO_BREAK)


def _picked(name: str, result: str, results: Path) -> Mapping[str, Any]:
    rows: list[Mapping[str, Any]] = [row for row in _result(result, results)["rows"] if row["name"] == name]
    if len(rows) != 1:
        raise TableError(f"{result}.json has {len(rows)} rows named '{name}', not one")
    return rows[0]


def _reached(row: Mapping[str, Any]) -> list[str]:
    """The two cells on what a row was to reach; empty where nothing was promised."""
    if row.get("reach") is None:
        return ["", ""]
    # Which way a reach points shows in whether it was met.
    sign = "≥" if (row["value"] > row["reach"]) == row["met"] else "≤"
    return [f"{sign} {quantity(row['reach'], row['unit'])}", "yes" if row["met"] else "**no**"]


def _result(name: str, results: Path) -> Mapping[str, Any]:
    path = results / f"{name}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"table {name}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"table {name}: {path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not document.get("rows"):
        raise TableError(f"table {name}: {path} has no rows")
    return document


def _conditions(document: Mapping[str, Any]) -> str:
    """One line on where the figures come from, of whatever the result says."""
    machine = document.get("machine", "")
    if isinstance(machine, Mapping):
        memory = round(machine["memory_bytes"] / (1 << 30))
        machine = f"{machine['cpu']} ({machine['architecture']}), {machine['cores']} cores, {memory} GiB"
    parts = [
        f"`{document['command']}`" if "command" in document else "",
        f"{document['threads']} threads" if "threads" in document else "",
        machine,
        ", ".join(f"{name} {version}" for name, version in document.get("versions", {}).items()),
        _commit(document.get("commit", "")),
    ]
    return "; ".join(part for part in parts if part) + "."


def _commit(commit: str) -> str:
    changed = " with changes" if commit.endswith("-dirty") else ""
    return f"commit {commit[:12]}{changed}" if commit else ""


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
