"""Configuration files: TOML of a bounded size, read into structs; errors name the key and a way out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import ConfigError
from edge_runtime.figures import MIB, size

MAX_CONFIG_BYTES = 1 << 20

#: From this likeness on, of 0 to 1, a key counts as a slip of another.
LIKE = 0.6

ConfigT = TypeVar("ConfigT", bound=Struct)
_MISSING = "Object missing required field "
_NO_CHOICE = "Invalid enum value "
_WRONG = re.compile(
    r"Expected `(?P<wanted>\w+)(?: \| null)?`(?:, got `\w+`| (?P<bound>[<>]=? .+)| matching regex '(?P<form>.*)')"
)
#: msgspec's names of types, as people write such values in TOML.
_IN_TOML = {
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "bool": "true or false",
    "object": "a table",
    "array": "a list in brackets",
}
#: What text must be, by the pattern it is held to; a name's pattern ends with how many more characters it may have.
_KEY_FORM = "{43}=$"
_NAME_FORM = re.compile(r"\^\[A-Za-z0-9\]\[A-Za-z0-9\._-\]\{0,(?P<more>\d+)\}\$")
_PLACE = re.compile(r"(?P<problem>.*?)(?: - at `\$(?P<place>[^`]*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>[0-9]+|\.\.\.)\]")


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table, unchecked.

    Raises:
        ConfigError: the file cannot be read, has more than ``MAX_CONFIG_BYTES``, or is not TOML; names it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} has more than {MAX_CONFIG_BYTES} bytes; is this a configuration file?")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise ConfigError(
            f"{path} is not TOML: it is not UTF-8; convert it: iconv -f {encoding} -t UTF-8"
        ) from error
    except (*MALFORMED, KeyError) as error:
        raise ConfigError(f"{path} is not TOML: {error}{_slip(data.decode('utf-8-sig'))}") from error


def _slip(text: str) -> str:
    """A slip that explains why a text is no TOML."""
    if re.search(r'=\s*"[A-Za-z]?:?[^"\n]*\\[^"\n]*"', text):
        return "; write a path that has backslashes in single quotes"
    if re.search("[=,[]\\s*[\u2018\u2019\u201c\u201d]", text):
        return '; write text in straight quotes, "…"'
    if text.lstrip().startswith("{"):
        return "; it is JSON, and TOML has a line KEY = VALUE for each key"
    return ""


#: Bound beyond any device, which catches a slip of the unit.
MAX_SIZE_BYTES = 1 << 50


_SIZE_FORM = re.compile(r"(?P<number>[0-9]{1,15})(?P<unit>[KMGT]?)(i?B)?", re.IGNORECASE)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


#: A cap that was written without its unit is taken for a number of MiB up to here, which is 64 GiB.
MOST_MEANT_MIB = 1 << 16


ByteSize = Annotated[int, Meta(ge=1, le=MAX_SIZE_BYTES)]


def parse_bytes(value: str | int) -> int:
    """Bytes from a number, or from text with a unit of 1024: ``"256M"``, ``"1G"``, ``"512 KiB"``.

    Raises:
        ConfigError: anything else, or more than ``MAX_SIZE_BYTES``.
    """
    match = _SIZE_FORM.fullmatch(str(value).replace(" ", ""))
    if match is None or isinstance(value, bool):
        raise ConfigError(f'{value!r} is not a size; write bytes as 268435456 or with a unit as "256M"')
    count = int(match["number"]) * _UNITS[match["unit"].upper()]
    if not 0 < count <= MAX_SIZE_BYTES:
        raise ConfigError(f"a size of {count} bytes is outside 1 to {MAX_SIZE_BYTES}")
    return count


def parse_cap(value: str | int) -> int:
    """A cap in bytes, as :func:`parse_bytes` reads it.

    Raises:
        ConfigError: it is no size, or is below 1 MiB, which is a slip of the unit; proposes the unit that was meant.
    """
    cap_bytes = parse_bytes(value)
    if cap_bytes >= MIB:
        return cap_bytes
    number = re.match("[0-9]+", str(value).replace(" ", ""))
    meant = (
        f'did you mean "{int(number[0])}M"?'
        if number and 1 <= int(number[0]) <= MOST_MEANT_MIB
        else ('write it with a unit, as "256M"')
    )
    raise ConfigError(f"a cap of {size(cap_bytes)} is less than any program takes; {meant}")


def read_struct(
    table: dict[str, Any], kind: type[ConfigT], *, dec_hook: Callable[[type, object], object] | None = None
) -> ConfigT:
    """A table of a configuration as the struct that it must be.

    Args:
        table: table as it was read.
        kind: struct to read it into; if it is open to fields that it does not know, they are refused all the same.
        dec_hook: function that makes values of types that msgspec does not know.

    Raises:
        ConfigError: a key is unknown (names the one that was meant, or the table it belongs to), missing (names all
            that are), none of its choices (names them), or out of its bounds.
    """
    refuse_unknown_keys(table, kind)
    try:
        return msgspec.convert(table, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        raise ConfigError(_in_words(str(error), table, kind)) from error


def refuse_unknown_keys(table: dict[str, Any], kind: type[Struct]) -> None:
    """Refuse keys of one table that its struct does not have.

    Raises:
        ConfigError: there is such a key; names it and what was probably meant.
    """
    _refuse_unknown(table, kind, "", kind)


def _refuse_unknown(table: dict[str, Any], kind: type[Struct], where: str, root: type[Struct]) -> None:
    """Refuse what no struct of the configuration has; tables within come after the keys of the table itself."""
    known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}unknown key {key!r}{_hint(key, list(known), root)}")
    for name, field in known.items():
        for inner in _structs_in(field.type):
            values = table.get(name)
            several = isinstance(values, list)
            for position, value in enumerate(values if isinstance(values, list) else [values]):
                if isinstance(value, dict):
                    place = f"{where.removesuffix(': ')}{'.' if where else ''}{name}"
                    _refuse_unknown(value, inner, f"{place}[{position}]: " if several else f"{place}: ", root)


def _hint(key: str, known: list[str], root: type[Struct]) -> str:
    """What a key was probably meant to be: one of this table, or of another one."""
    from difflib import SequenceMatcher  # noqa: PLC0415 - devices do without it until something is wrong

    elsewhere = sorted({f"[{path}]" for path, name in _keys_of(root, "") if name == key and path})
    if elsewhere:
        return f"; it belongs into {' or '.join(elsewhere)}"
    if any(name == key for path, name in _keys_of(root, "") if not path):
        return "; it belongs above the first table, at the top of the file"
    likeness = {name: SequenceMatcher(None, key, name).ratio() for name in known}
    best = max(likeness.values(), default=0.0)
    if best >= LIKE:
        near = [name for name in known if likeness[name] == best]
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; there are: {', '.join(known)}"


def _keys_of(kind: type[Struct], path: str) -> Iterator[tuple[str, str]]:
    """Every key of a configuration, each with the name of its table; that of the file itself is empty."""
    for field in msgspec.structs.fields(kind):
        yield path, field.encode_name
        for inner in _structs_in(field.type):
            yield from _keys_of(inner, f"{path}.{field.encode_name}".lstrip("."))


def _structs_in(annotation: object) -> Iterator[type[Struct]]:
    """The structs that a value of this type may be or hold."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        yield annotation
        return
    for part in getattr(annotation, "__args__", ()):
        yield from _structs_in(part)


def _in_words(message: str, table: dict[str, Any], root: type[Struct]) -> str:
    """An error of msgspec; where it names no choices, or one of several missing keys, with all of them."""
    match = _PLACE.fullmatch(message)
    if match is None:
        return message
    problem, place = match["problem"], match["place"] or ""
    steps = [step["key"] or int(step["index"]) for step in _STEP.finditer(place) if step["index"] != "..."]
    if problem.startswith(_NO_CHOICE):
        kind = _type_at(root, steps)
        choices = ", ".join(repr(choice) for choice in _choices(kind))
        listed = ", and no list" if any(get_origin(part) is tuple for part in get_args(kind)) else ""
        return f"{place.lstrip('.')}: {_value_at(table, steps)!r} is none of: {choices}{listed}"
    if problem.startswith(_MISSING):
        missing = _missing(_type_at(root, steps), _value_at(table, steps))
        where = f"{place.lstrip('.')}: " if place else ""
        words = "a key is missing" if len(missing) == 1 else "keys are missing"
        return f"{where}{words}: {', '.join(missing)}"
    wrong = _WRONG.fullmatch(problem)
    if wrong is None or wrong["wanted"] not in _IN_TOML or "..." in place:
        return message
    key = place.lstrip(".")
    if key.endswith("token"):  # a secret, and errors go into logs
        return f"{key} must be {_wanted(wrong)}"
    return f"{key} is {_as_toml(_value_at(table, steps))}, it must be {_wanted(wrong)}"


def _as_toml(value: object) -> str:
    """A value as it stands in the file, shortened; of lists and tables only what they are."""
    if isinstance(value, dict | list):
        return _IN_TOML["object" if isinstance(value, dict) else "array"]
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value[:60]}"' if isinstance(value, str) else str(value)[:60]


def _wanted(wrong: re.Match[str]) -> str:
    """What a value must be, of what msgspec says of one that is not."""
    kind = _IN_TOML[wrong["wanted"]]
    if wrong["bound"]:
        return f"{kind} {wrong['bound']}"
    if wrong["form"] is None:
        return kind
    form = wrong["form"].partition("(?!")[
        0
    ]  # that nothing follows, not even a line feed, goes without saying
    if form.endswith(_KEY_FORM):
        return "a public key, 44 characters as 'edge-export key' prints them"
    name = _NAME_FORM.fullmatch(form)
    if name is None:
        return f"{kind} that matches {form}"
    most = int(name["more"]) + 1
    return (
        f"a name of 1 to {most} letters, digits, '.', '_' and '-', of which the first is a letter or a digit"
    )


def _value_at(table: object, steps: list[str | int]) -> Any:
    """What stands at a place of a table."""
    for step in steps:
        table = table[step]  # type: ignore[index] # msgspec has walked the same way
    return table


def _type_at(root: object, steps: list[str | int]) -> object:
    """The type that stands at a place of a struct."""
    found = root
    for step in steps:
        if isinstance(step, int):
            found = next(iter(getattr(found, "__args__", ())), None)
            continue
        for struct in _structs_in(found):
            found = next(f.type for f in msgspec.structs.fields(struct) if f.encode_name == step)
            break
    return found


def _choices(annotation: object) -> list[Any]:
    """The values that a type of choices has."""
    if get_origin(annotation) is Literal:
        return sorted(get_args(annotation))
    return [choice for part in getattr(annotation, "__args__", ()) for choice in _choices(part)]


def _missing(annotation: object, table: Any) -> list[str]:
    """Required keys of a struct that a table lacks."""
    for struct in _structs_in(annotation):
        return [
            f.encode_name for f in msgspec.structs.fields(struct) if f.required and f.encode_name not in table
        ]
    return []
