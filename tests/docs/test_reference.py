"""docs/configuration.md and docs/cli.md say what the code does, and say it of every key and option."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec.inspect as types
import pytest
from msgspec import Struct

from coordinator.config import read_run_config
from coordinator.simulation.config import FleetConfig, read_simulation_config
from docs.generate import commands, configuration, outputs
from docs.generate.configuration import (
    FILES,
    PageError,
    anchor,
    descriptions,
    fields_of,
    is_size,
    key_table,
    tables_of,
)
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.errors import ConfigError

PAGES = {module.PAGE: module.page for module in (configuration, commands, outputs)}
LOADERS: tuple[Callable[[Path], Struct], ...] = (read_run_config, load_config, read_simulation_config)
EXAMPLES = re.findall(r"```toml\n(.*?)```", configuration.PAGE.read_text("utf-8"), re.DOTALL)
STRUCTS = [struct for file in FILES for struct in tables_of(file.config)]


class Inner(Struct):
    """A table.

    Attributes:
        size: size of it, which
            takes two lines to say.

    Other words, as: these.
    """

    size: int = 0


class Outer(Inner):
    """A table that inherits a key.

    Attributes:
        name: name of it.
    """

    name: str = ""


class Silent(Inner):
    """A table that does not say what its own key is."""

    name: str = ""


class Twofold(Inner):
    """A table that says again what it inherits.

    Attributes:
        size: another size.
    """


class Stray(Inner):
    """A table that describes what is not there.

    Attributes:
        colour: colour of it.
    """


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_code_makes(path: Path) -> None:
    """The pages in the tree are those that the code makes now."""
    stale = path.read_text("utf-8") != PAGES[path]()
    assert not stale, f"docs/{path.name} is out of date: run 'make reference' and commit what it wrote"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Every link within a page leads to one heading, and every other link to a file."""
    text = path.read_text("utf-8")
    anchors = [anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert anchors.count(target[1:]) == 1, target
        else:
            assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("number", range(len(FILES)), ids=[file.title for file in FILES])
def test_examples_load(number: int, tmp_path: Path) -> None:
    """Each example of the page is a file that its command reads."""
    path = tmp_path / "example.toml"
    path.write_text(EXAMPLES[number], "utf-8")
    assert LOADERS[number](path)


@pytest.mark.parametrize("number", range(len(FILES)), ids=[file.title for file in FILES])
def test_examples_are_complete(number: int) -> None:
    """Each example has every table of its file."""
    tables = tables_of(FILES[number].config)
    for path in [path for paths in tables.values() for path in paths]:
        table = tomllib.loads(EXAMPLES[number])
        for name in path.strip("[]").split("."):
            assert name in table, path
            table = table[name]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_allowed_word_is_explained(struct: type[Struct]) -> None:
    """Where a key takes one of several words, its meaning has each of them."""
    for field in fields_of(struct):
        kinds = field.type.types if isinstance(field.type, types.UnionType) else (field.type,)
        for kind in kinds:
            for word in kind.values if isinstance(kind, types.LiteralType) else ():
                assert f'``"{word}"``' in descriptions(struct)[field.name], (field.name, word)


@pytest.mark.parametrize(
    ("struct", "example", "header", "load"),
    [
        (DeviceConfig, EXAMPLES[1], "", load_config),
        (FleetConfig, EXAMPLES[2], "[fleet]\n", read_simulation_config),
    ],
)
def test_sizes_are_what_takes_a_unit(
    struct: type[Struct], example: str, header: str, load: Callable[[Path], Struct], tmp_path: Path
) -> None:
    """The keys that the page calls sizes take text with a unit, and no other whole number does."""
    path = tmp_path / "example.toml"
    for field in fields_of(struct):
        if not isinstance(field.type, types.IntType):
            continue
        without = re.sub(rf"^{field.name} = .*\n", "", example, flags=re.MULTILINE)
        before, found, after = without.partition(header) if header else ("", "", without)
        path.write_text(f'{before}{found}{field.name} = "1G"\n{after}', "utf-8")
        if is_size(field.type):
            assert load(path)
        else:
            with pytest.raises(ConfigError, match=field.name):
                load(path)


def test_descriptions_are_inherited() -> None:
    """A key of a base struct means what the base struct's docstring says, in one line."""
    assert descriptions(Outer) == {"name": "name of it.", "size": "size of it, which takes two lines to say."}


@pytest.mark.parametrize(
    ("struct", "message"),
    [
        (Silent, "Silent.name has no description"),
        (Twofold, "Twofold.size is described twice; keep what Inner says"),
        (Stray, "Stray describes colour, which is no field"),
    ],
)
def test_a_key_is_described_once(struct: type[Struct], message: str) -> None:
    """A key without a description, with two, and a description without a key stop the page."""
    with pytest.raises(PageError, match=re.escape(message)):
        key_table(struct, {})


@pytest.mark.parametrize(
    ("help_text", "message"), [(None, "tool --size SIZE has no help"), ("size of it", "must end with")]
)
def test_an_option_is_described(help_text: str | None, message: str) -> None:
    """An option without help, or whose help is silent about its default, stops the page."""
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_argument("--size", default=1, help=help_text)
    with pytest.raises(PageError, match=message):
        commands.option_table(parser)


@pytest.mark.parametrize("program", ["edge_runtime", "export", "coordinator"])
def test_parsers_need_no_libraries(program: str) -> None:
    """A program's options are known without the libraries that its commands run on."""
    script = (
        f"import sys; from {program}.cli import build_parser; build_parser()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'onnxruntime', 'litestar', 'uvicorn', 'msgspec'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
