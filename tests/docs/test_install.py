"""The pages that tell how a board gets the agent: their commands are commands, and their packages are what is built."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from devices.packaging.wheels import PYTHONS
from edge_runtime import __version__
from edge_runtime.cli import build_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/install").glob("*.md"))


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a block of a page."""
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line.split() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_three_commands_install(page: Path) -> None:
    """Install, configure, start; the package's name is the one that make deb writes."""
    install, configure, start = commands(page)[:3]
    assert install[:3] == ["sudo", "apt", "install"]
    named = re.fullmatch(r"\./edge-runtime_(.+)\+py(.+)_arm64\.deb", install[3])
    assert named is not None
    assert (named[1], named[2] in PYTHONS) == (__version__, True)
    assert configure == ["sudoedit", "/etc/edge-runtime/device.toml"]
    assert start == ["sudo", "systemctl", "enable", "--now", "edge-runtime"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_agent_are_commands(page: Path) -> None:
    """Each line that starts the agent's program has words that it takes."""
    lines = [words for words in commands(page) if "edge-runtime" in words and "systemctl" not in words]
    assert lines
    for words in lines:
        at = len(words) - words[::-1].index("edge-runtime")  # after the user's name, the program's
        build_parser().parse_args(words[at:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_every_python_that_has_a_package(page: Path) -> None:
    """Whatever a page offers as ``+py`` is built."""
    found = set(re.findall(r"\+py(\d\.\d+)", page.read_text("utf-8")))
    assert found
    assert found <= set(PYTHONS)


def test_what_a_page_says_to_fill_in_is_there() -> None:
    """The configuration that is installed has the keys that the pages name."""
    keys = set(tomllib.loads((ROOT / "devices/profiles/generic.toml").read_text()))
    assert {"coordinator_url", "publisher_key", "device_name", "enrolment_token_file", "data"} <= keys
