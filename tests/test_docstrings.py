"""How arguments, attributes and results are described: one a line, with a noun."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Folders whose docstrings keep to the form.
CLEAN = ("benchmarks", "coordinator", "edge_runtime", "examples", "export")

NAMED, UNNAMED = {"Args:", "Attributes:"}, {"Returns:"}
#: "name: what it is"; names start with stars where they stand for several arguments.
ENTRY = re.compile(r"^\*{0,2}(?P<name>\w+): (?P<text>\S.*)$")
WITHOUT_NOUN = re.compile(r"^(of|as|by)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One description: its first line as written, what it describes (empty in ``Returns``), and all of its text."""

    line: str
    name: str
    text: str


def entries(docstring: str) -> Iterator[Entry]:
    """The descriptions in a docstring's sections; a line that is not "name: text" keeps an empty text."""
    section, blocks = "", list[list[str]]()
    for line in [*docstring.splitlines(), "end"]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            yield from (_entry(section, block) for block in blocks)
            section, blocks = line.strip(), []
        elif line.strip() and section in NAMED | UNNAMED:
            starts = not blocks or (section in NAMED and indent == 4)
            blocks.append([line.strip()]) if starts else blocks[-1].append(line.strip())


def _entry(section: str, block: list[str]) -> Entry:
    if section in UNNAMED:
        return Entry(block[0], "", " ".join(block))
    match = ENTRY.match(block[0])
    return (
        Entry(block[0], match["name"], " ".join([match["text"], *block[1:]]))
        if match
        else Entry(block[0], "", "")
    )


def arguments_of(node: ast.AST) -> set[str]:
    """Names that a docstring may describe: a function's arguments; a class's fields and its constructor's arguments."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        given = node.args
        return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
    names: set[str] = set()
    for each in getattr(node, "body", []):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            names.add(each.target.id)
        elif isinstance(each, ast.FunctionDef) and each.name == "__init__":
            names |= arguments_of(each)
    return names


def faults(source: str) -> list[str]:
    """What is wrong with the descriptions in a module, each with its line of the docstring."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        names = arguments_of(node)
        for entry in entries(ast.get_docstring(node) or ""):
            if not entry.text:
                found.append(f"{node.name}: {entry.line!r} is not 'name: what it is'")
            elif WITHOUT_NOUN.match(entry.text):
                found.append(f"{node.name}: {entry.line!r} begins without a noun")
            elif others := [each for each in names if re.search(rf"[.;,)] {each}: ", f"{entry.text} ")]:
                found.append(f"{node.name}: {entry.line!r} describes {others[0]} too")
    return found


@pytest.mark.parametrize("folder", CLEAN)
def test_descriptions_have_a_noun_and_a_line_each(folder: str) -> None:
    """No description of an argument, attribute or result begins with of, as or by, or describes two of them."""
    wrong = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for fault in faults(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("Args:\n        a: of the first kind.", "begins without a noun"),
        ("Args:\n        a: first number,\n            as it came. b: second number.", "describes b too"),
        ("Args:\n        a, b: two numbers.", "is not 'name: what it is'"),
        ("Returns:\n        As many numbers as there are.", "begins without a noun"),
        (
            "Args:\n        a: first number.\n        b: second number, by which\n            the first is divided.",
            "",
        ),
    ],
)
def test_the_bad_forms_are_found(lines: str, fault: str) -> None:
    """Each form that is refused is found in a function that has it, and a good docstring has no fault."""
    found = faults(f'def divide(a, b):\n    """Divide.\n\n    {lines}\n    """\n')
    assert len(found) == bool(fault)
    assert all(fault in each for each in found)
