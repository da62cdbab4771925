"""The README: its size, and the commands it shows."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from coordinator.cli import main as edge_coordinator
from edge_runtime.cli import main as edge_runtime
from export.cli import main as edge_export

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PROGRAMS = {"edge-coordinator": edge_coordinator, "edge-export": edge_export, "edge-runtime": edge_runtime}
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
COMMANDS = [line for line in BLOCKS.splitlines() if line.split(" ")[0] in PROGRAMS]


class ParsedError(Exception):
    """A command line was accepted; raised in place of carrying it out."""


def test_it_fits_on_a_few_screens() -> None:
    """The README stays below 8,000 bytes; what is longer has a page of its own."""
    assert len(README.encode()) < 8000


def test_it_shows_every_program() -> None:
    """Each of the three programs has at least one command in the README."""
    assert {line.split()[0] for line in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command with its options is one that the program's own parser accepts."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, words: list[str]) -> None:
        parse_args(parser, words)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    program, *words = shlex.split(line, comments=True)
    with pytest.raises(ParsedError):
        PROGRAMS[program](words)


def test_its_make_targets_exist() -> None:
    """Every make target that the README names is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(
        re.findall(r"^make ([a-z-]+)", BLOCKS, re.MULTILINE)
    )
    assert {"demo", "test", "setup"} <= named <= targets
