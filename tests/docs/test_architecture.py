"""docs/architecture.md draws the layers that the code has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_structure import PROGRAMS, ROOT

ROW = re.compile(r"^\| `([a-z0-9_]+(?:\.py|/))` \| .+ \|$")


def layers(program: str) -> list[str]:
    """The rows of a program's table, from the lowest layer up: names of folders and files."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = page.partition(f"\n### {program}\n")[2].partition("\n##")[0]
    return [row[1] for row in map(ROW.match, section.splitlines()) if row]


def layer_of(program: str, path: Path) -> str:
    """The folder or file of a program that a module belongs to."""
    first, *rest = path.relative_to(ROOT / program).parts
    return f"{first}/" if rest else first


def imported(path: Path, program: str) -> set[str]:
    """Layers of its own program that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == program and len(parts) > 1:
                module = ROOT / program / parts[1]
                if module.is_dir():
                    found.add(f"{parts[1]}/")
                elif module.with_suffix(".py").is_file():
                    found.add(f"{parts[1]}.py")
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_page_lists_every_folder(program: str) -> None:
    """A program's table names each of its folders and top-level modules once, and nothing else."""
    modules = [path for path in (ROOT / program).rglob("*.py") if path.parent != ROOT / program]
    modules += [path for path in (ROOT / program).glob("*.py") if path.name != "__init__.py"]
    listed = layers(program)
    assert sorted(listed) == sorted({layer_of(program, path) for path in modules})


@pytest.mark.parametrize("program", PROGRAMS)
def test_imports_point_up_the_table(program: str) -> None:
    """A folder imports only folders that stand above it in its program's table."""
    order = layers(program)
    for path in sorted((ROOT / program).rglob("*.py")):
        layer = layer_of(program, path)
        if layer == "__init__.py":
            continue
        above = order[: order.index(layer) + 1]
        assert imported(path, program) <= set(above), path
