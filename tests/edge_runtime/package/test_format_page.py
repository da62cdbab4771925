"""docs/package-format.md names what is in the manifest and in ``prepared.json``: every field, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import msgspec
import pytest
from msgspec import Meta, Struct

from edge_runtime.package.manifest import (
    ARITHMETICS,
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    Manifest,
    PackagePath,
)
from edge_runtime.package.prepared import PREPARED_VERSION, Prepared
from edge_runtime.protocol.messages import Bytes, Count, Identifier, PositiveCount, Sha256, Text

PAGE = (Path(__file__).parents[3] / "docs" / "package-format.md").read_text("utf-8")
FIELD = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*?)\|$", re.MULTILINE)
TYPES = {
    "count": Count,
    "positive": PositiveCount,
    "bytes": Bytes,
    "text": Text,
    "identifier": Identifier,
    "sha256": Sha256,
    "path": PackagePath,
}


def structs(kind: type[Struct], path: str, prefix: str) -> Iterator[tuple[str, type[Struct]]]:
    """A struct and those in its fields, each with the heading under which the page has it."""
    yield path, kind
    for name, hint in get_type_hints(kind).items():
        for inner in inside(hint):
            yield from structs(inner, f"{prefix}{name}", f"{prefix}{name}.")


def inside(hint: object) -> Iterator[type[Struct]]:
    """The structs that a field's type is made of."""
    if isinstance(hint, type) and issubclass(hint, Struct):
        yield hint
    elif get_origin(hint) is not None:
        for part in get_args(hint):
            yield from inside(part)


def documented() -> dict[str, type[Struct]]:
    """Heading to struct, for every struct once: where it first occurs."""
    first: dict[type[Struct], str] = {}
    for root, heading, prefix in (
        (Manifest, "manifest.json", ""),
        (Prepared, "prepared.json", "prepared.json "),
    ):
        for path, kind in structs(root, heading, prefix):
            first.setdefault(kind, path)
    return {path: kind for kind, path in first.items()}


def section(heading: str) -> str:
    """What the page has under a heading, up to the next one."""
    match = re.search(rf"^##+ `{re.escape(heading)}`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, f"the page has no section {heading}"
    return match[1]


def test_the_page_has_a_section_for_each_struct_and_no_other() -> None:
    """Sections with a name in code style are those of the structs that the files are made of."""
    assert set(re.findall(r"^##+ `(.+)`$", PAGE, re.MULTILINE)) == set(documented())


@pytest.mark.parametrize("heading", sorted(documented()))
def test_a_section_names_every_field_in_order(heading: str) -> None:
    """The table of a struct has its fields in their order, and says which of them have a default."""
    fields = msgspec.structs.fields(documented()[heading])
    rows = FIELD.findall(section(heading))
    assert [name for name, _, _ in rows] == [field.encode_name for field in fields]
    assert {name: "default" in kind for name, kind, _ in rows} == {
        field.encode_name: not field.required for field in fields
    }


@pytest.mark.parametrize("name", sorted(TYPES))
def test_the_bounds_of_types_are_those_of_the_code(name: str) -> None:
    """The table of types gives each type's least and largest value, longest text and pattern."""
    row = re.search(rf"^\| {name} \| (.*) \|$", PAGE, re.MULTILINE)
    assert row
    base, *extra = get_args(TYPES[name])
    assert get_origin(TYPES[name]) is Annotated
    meta = next(each for each in extra if isinstance(each, Meta))
    assert row[1].startswith("integer" if base is int else "a string")
    if base is int:
        assert row[1] == f"integer, {meta.ge} to {meta.le}"
    if meta.max_length is not None:
        assert f"at most {meta.max_length} characters" in row[1]
    if meta.pattern is not None:
        assert f"`{meta.pattern}`" in row[1]


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    """Format versions, the size limit and the arithmetics are the ones that the code has."""
    assert f"This page describes version {FORMAT_VERSION}." in PAGE
    assert f"| `version` | positive | {PREPARED_VERSION} |" in PAGE
    assert f"at most {MAX_MANIFEST_BYTES >> 20} MiB" in PAGE
    listed = re.search(r"^\| arithmetic \| (.*) \|$", PAGE, re.MULTILINE)
    assert listed
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(ARITHMETICS)
