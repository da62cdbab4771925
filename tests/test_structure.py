"""Rules that hold for the whole tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What each program may not import, directly or not: the direction of dependence.
FORBIDDEN = {
    "edge_runtime": {"coordinator", "docs", "export", "torch", "transformers"},
    "coordinator": {"docs", "export", "torch", "transformers"},
    "export": {"coordinator", "docs"},
}


def imports_of(path: Path) -> set[str]:
    """Top-level names a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_dependencies_point_one_way(package: str) -> None:
    """No file of a program imports what lies above it."""
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not imports_of(path) & FORBIDDEN[package], path


def test_every_test_says_what_it_shows() -> None:
    """Every test has a docstring of one sentence that starts with a capital and ends with a full stop."""
    missing = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                text = ast.get_docstring(node) or ""
                if not (text and text.rstrip().endswith(".")):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing, missing


def test_no_file_is_a_drawer_for_everything() -> None:
    """No module is called utils, helpers, common or misc."""
    names = {path.stem for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_the_repository_names_no_package_index() -> None:
    """Pinned files hold names, versions and hashes, and no address to fetch them from."""
    for name in (
        "constraints.txt",
        "torch.txt",
        "examples/banking77/model.txt",
        "pyproject.toml",
        "Makefile",
    ):
        text = (ROOT / name).read_text()
        assert "://" not in text, name
        assert "index-url" not in text.replace("--no-emit-index-url", ""), name
