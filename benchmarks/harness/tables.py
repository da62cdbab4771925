"""Tables of the README, made from result files: ``python -m benchmarks.harness.tables README.md [--check]``.

Between ``<!-- table:NAME -->`` and ``<!-- /table -->`` stands the table of ``benchmarks/results/NAME.json``, any result
file that has ``rows`` of name, value and unit, with or without a value to reach.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.result_file import RESULTS

END = "<!-- /table -->"
MARKED = re.compile(r"<!-- table:(?P<name>[A-Za-z0-9._-]+) -->\n(?P<body>.*?)" + re.escape(END), re.DOTALL)
OPENING = re.compile(r"<!-- table:")


class TableError(Exception):
    """A table cannot be made; the message names marker or file."""


def main(argv: list[str] | None = None) -> int:
    """Rewrite the file, or with ``--check`` only say whether it is up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.file.read_text(encoding="utf-8")
        wanted = with_tables(text, arguments.results)
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


def with_tables(text: str, results: Path) -> str:
    """``text`` with the table between every pair of markers made anew.

    Raises:
        TableError: a marker is not closed, or its result file is missing or has no rows.
    """
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise TableError(f"every '<!-- table:NAME -->' needs its own '{END}', and a line break after it")
    return MARKED.sub(lambda found: _marked(found["name"], results), text)


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
        if reach and row.get("reach") is not None:
            # Which way a reach points shows in whether it was met.
            sign = "≥" if (row["value"] > row["reach"]) == row["met"] else "≤"
            cells += [f"{sign} {quantity(row['reach'], unit)}", "yes" if row["met"] else "**no**"]
        elif reach:
            cells += ["", ""]
        lines.append(_line(cells))
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


def _marked(name: str, results: Path) -> str:
    path = results / f"{name}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"table {name}: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"table {name}: {path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not document.get("rows"):
        raise TableError(f"table {name}: {path} has no rows")
    return f"<!-- table:{name} -->\n{table(document)}\n{END}"


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
