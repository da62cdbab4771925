"""What the docstring of a struct says of each field: the one place where a configuration's keys are explained."""

from __future__ import annotations

import inspect
import re

from msgspec import Struct

_ENTRY = re.compile(r" {4}(?P<name>\w+): (?P<text>.*)")


def descriptions(struct: type[Struct]) -> dict[str, str]:
    """What the docstrings of a struct and of those it inherits from say of each field.

    Raises:
        ValueError: two of them describe the same field.
    """
    found: dict[str, str] = {}
    for each in struct.__mro__:
        if not issubclass(each, Struct) or each is Struct:
            continue
        for name, text in attributes(vars(each).get("__doc__") or "").items():
            if name in found:
                raise ValueError(
                    f"{struct.__name__}.{name} is described twice; keep what {each.__name__} says of it"
                )
            found[name] = text
    return found


def attributes(docstring: str) -> dict[str, str]:
    """The entries under ``Attributes:``, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(docstring).partition("Attributes:\n")[2].splitlines():
        if match := _ENTRY.match(line):
            name = match["name"]
            found[name] = match["text"]
        elif line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
        else:
            break
    return found
