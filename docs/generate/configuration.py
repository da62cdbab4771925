"""Makes docs/configuration.md from the structs that read the files: ``python -m docs.generate.configuration``.

A tool of developers beside the pages it writes, which no program imports and no wheel holds. Types, bounds and defaults
are the struct's own. What a key means is said once: under ``Attributes:`` in the docstring of the struct, or of one
that it inherits from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec.inspect as types
from msgspec import NODEFAULT, Struct

from coordinator.config import RunConfig
from coordinator.simulation.config import SimulationConfig
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.config_file import MAX_SIZE_BYTES
from edge_runtime.described import descriptions
from edge_runtime.protocol.messages import END

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/configuration.md"
#: Forms of text that have a name on the page, and their patterns.
NAME = re.compile(re.escape("^[A-Za-z0-9][A-Za-z0-9._-]{0,") + r"(\d+)" + re.escape("}" + END))
PUBLIC_KEY = "^[A-Za-z0-9+/]{43}=" + END
FUNCTION = "^[A-Za-z_][A-Za-z0-9_.]{0,199}:[A-Za-z_][A-Za-z0-9_.]{0,199}" + END
HOURS = "^[0-9]{2}:[0-9]{2}-[0-9]{2}:[0-9]{2}" + END


class PageError(Exception):
    """A page cannot be made; the message names what has to be described, and where."""


@dataclass(frozen=True)
class File:
    """A configuration file.

    Attributes:
        title: heading of its section.
        config: struct that it is read into.
        example: file that the section shows.
        about: paragraph that opens the section.
    """

    title: str
    config: type[Struct]
    example: Path
    about: str


FILES = (
    File(
        "run.toml",
        RunConfig,
        ROOT / "docs/generate/run.toml",
        "What a run does, for `edge-coordinator run create run.toml`. The coordinator looks for `package` and the\n"
        "evaluation's `data` on its own machine. Settings of published methods are in [methods.md](methods.md).",
    ),
    File(
        "device.toml",
        DeviceConfig,
        ROOT / "devices/profiles/generic.toml",
        "What an operator decides about a device. `edge-runtime` reads `/etc/edge-runtime/device.toml`, or what\n"
        "`--config` names; `edge-runtime check` says what is wrong with it. In paths, `~` is the home folder.\n"
        "Template: [`devices/profiles/generic.toml`](../devices/profiles/generic.toml).",
    ),
    File(
        "A simulation's file",
        SimulationConfig,
        ROOT / "docs/generate/simulation.toml",
        "What `edge-coordinator simulate` plays; see [simulate.md](simulate.md).",
    ),
)
OPENING = """<!-- Made by `make reference`. Change the docstrings of the structs, not this page. -->
# Configuration files

All of them are TOML. Where a key is unknown, missing or out of its bounds, the command ends with one line that names
file and key.

- **Paths** that are relative start at the folder of the file.
- **Sizes** are numbers of bytes, or text with a unit of 1024: `268435456`, `"256M"`, `"1G"`, `"512 KiB"`.
- **Names** have letters, digits, `.`, `_` and `-`, and start with a letter or a digit.
- **Public keys** are the 44 characters of base64 that `edge-export key` prints.
- Keys that end in `_s` are in seconds.
- *Unset* is a key that is left out.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([OPENING, *(section(file) for file in FILES)])


def section(file: File) -> str:
    """A file's example, and a table of the keys of each of its TOML tables."""
    tables = tables_of(file.config)
    links = {struct: f"[table](#{anchor(heading(paths))})" for struct, paths in tables.items() if paths}
    example = f"```toml\n{file.example.read_text('utf-8')}```\n"
    parts = [f"## {file.title}\n", f"{file.about}\n", example]
    for struct, paths in tables.items():
        if paths:
            parts.append(f"### {heading(paths)}\n")
        parts.append(key_table(struct, links))
    return "\n".join(parts)


def tables_of(config: type[Struct]) -> dict[type[Struct], list[str]]:
    """The structs of a file, each with the names of the TOML tables that it is read from; the file itself has none."""
    found: dict[type[Struct], list[str]] = {config: []}

    def visit(struct: type[Struct], path: str) -> None:
        for field in fields_of(struct):
            for inner, repeated in structs_in(field.type):
                name = f"{path}{field.encode_name}"
                found.setdefault(inner, []).append(f"[[{name}]]" if repeated else f"[{name}]")
                visit(inner, f"{name}.")

    visit(config, "")
    return found


def fields_of(struct: type[Struct]) -> tuple[types.Field, ...]:
    """The fields of a struct, those that it inherits first."""
    info = types.type_info(struct)
    if not isinstance(info, types.StructType):
        raise PageError(f"{struct.__name__} is read by rules of its own")
    return info.fields


def structs_in(kind: types.Type, repeated: bool = False) -> Iterator[tuple[type[Struct], bool]]:
    """The structs that a value may be, and whether in a list."""
    match kind:
        case types.StructType(cls=struct):
            yield struct, repeated
        case types.UnionType(types=several):
            for each in several:
                yield from structs_in(each, repeated)
        case types.VarTupleType(item_type=item):
            yield from structs_in(item, True)


def heading(paths: Sequence[str]) -> str:
    """The heading of a TOML table's section."""
    return " and ".join(f"`{path}`" for path in paths)


def anchor(text: str) -> str:
    """What a link to a heading ends in."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def key_table(struct: type[Struct], links: dict[type[Struct], str]) -> str:
    """The keys of one struct: those without a default first, and its own before those that it inherits.

    Raises:
        PageError: a field has no description, or a description has no field.
    """
    try:
        described = descriptions(struct)
    except ValueError as error:
        raise PageError(str(error)) from error
    rows = []
    own = vars(struct).get("__annotations__", {})
    for field in sorted(fields_of(struct), key=lambda field: (not field.required, field.name not in own)):
        if field.name not in described:
            raise PageError(
                f"{struct.__module__}.{struct.__name__}.{field.name} has no description; add the line "
                f'"{field.name}: …" under "Attributes:" in the docstring of the struct'
            )
        default = "required" if field.required else default_of(field)
        meaning = described.pop(field.name)
        meaning = meaning[0].upper() + meaning[1:]
        rows.append((f"`{field.encode_name}`", words(field.type, links), default, meaning))
    if described:
        raise PageError(
            f"{struct.__module__}.{struct.__name__} describes {min(described)}, which is no field"
        )
    return table(("key", "value", "default", "meaning"), rows)


def words(kind: types.Type, links: dict[type[Struct], str]) -> str:
    """What a value may be."""
    match kind:
        case types.UnionType(types=several):
            given = [words(each, links) for each in several if not isinstance(each, types.NoneType)]
            said = ", or ".join(given)
        case types.LiteralType(values=values):
            said = ", ".join(code(value) for value in values)
        case types.BoolType():
            said = "`true`, `false`"
        case types.IntType() if is_size(kind):
            said = "size" if kind.ge else "size, or 0"
        case types.IntType():
            said = f"whole number{bounds(kind)}"
        case types.FloatType():
            said = f"number{bounds(kind)}"
        case types.StrType():
            said = text_words(kind)
        case types.VarTupleType(item_type=item):
            said = f"list{length(kind)}, each a {words(item, links)}"
        case types.DictType():
            said = "table"
        case types.StructType(cls=struct):
            said = links[struct]
        case types.CustomType(cls=cls) if cls is Path:
            said = "path"
        case _:
            raise PageError(f"{kind} has no words yet; add them here")
    return said


def bounds(kind: types.IntType | types.FloatType) -> str:
    """The range of a number."""
    if kind.ge is not None and kind.le is not None:
        return f" from {figure(kind.ge)} to {figure(kind.le)}"
    limits = (("from", kind.ge), ("above", kind.gt), ("below", kind.lt), ("up to", kind.le))
    said = ", ".join(f"{word} {figure(limit)}" for word, limit in limits if limit is not None)
    return f" {said}" if said else ""


def figure(number: float) -> str:
    """A bound for people; large ones as the powers of two that they are."""
    whole = int(number)
    for power, ending in ((whole, ""), (whole + 1, " - 1")):
        if whole > 1 << 30 and power & (power - 1) == 0:
            return f"2^{power.bit_length() - 1}{ending}"
    return f"{number:,}" if whole != number else f"{whole:,}"


def text_words(kind: types.StrType) -> str:
    """The form of a text."""
    if kind.pattern is None:
        return f"text{length(kind, ' characters')}"
    if kind.pattern == PUBLIC_KEY:
        return "public key"
    if kind.pattern == FUNCTION:
        return "`module:function`"
    if kind.pattern == HOURS:
        return "two times of day, `HH:MM-HH:MM`"
    if match := NAME.fullmatch(kind.pattern):
        return f"name of up to {int(match[1]) + 1} characters"
    raise PageError(f"the pattern {kind.pattern} has no name yet; give it one here and on the page")


def length(kind: types.StrType | types.VarTupleType, unit: str = "") -> str:
    """The bounds of a length."""
    if kind.max_length is None:
        return ""
    least = f"{kind.min_length:,} to" if kind.min_length else "up to"
    return f" of {least} {kind.max_length:,}{unit}"


def default_of(field: types.Field) -> str:
    """What a key that is left out means."""
    value = field.default if field.default is not NODEFAULT else field.default_factory()
    if value is None:
        return "unset"
    if isinstance(value, Struct):
        return "its defaults"
    if value == {}:
        return "empty"
    if is_size(field.type):
        return code(size(value))
    return code(value)


def is_size(kind: types.Type) -> bool:
    """Whether a number is one of bytes: those alone have this bound, and a unit if they are text."""
    return isinstance(kind, types.IntType) and kind.le == MAX_SIZE_BYTES


def size(number: int) -> str:
    """A number of bytes with the largest unit that it is a multiple of."""
    power = max(power for power in range(5) if number % (1 << 10 * power) == 0)
    return f"{number >> 10 * power}{'BKMGT'[power]}"


def code(value: object) -> str:
    """A value as TOML has it."""
    return f"`{json.dumps(value)}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are texts, with code between pairs of backticks as docstrings have it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
