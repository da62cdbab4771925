"""Docstrings of structs, read field by field."""

from __future__ import annotations

import pytest
from msgspec import Struct

from edge_runtime.described import attributes, descriptions


class Below(Struct):
    """A table.

    Attributes:
        size: size of it, which
            takes two lines.
    """

    size: int = 0


class Above(Below):
    """A table that inherits a key.

    Attributes:
        name: name of it.
    """

    name: str = ""


class Again(Below):
    """A table that says what is said.

    Attributes:
        size: another.
    """


def test_what_is_inherited_is_described_where_it_is_defined() -> None:
    """A field's words come from the struct that defines it, over several lines too; twice is an error."""
    assert descriptions(Above) == {"name": "name of it.", "size": "size of it, which takes two lines."}
    with pytest.raises(ValueError, match=r"Again\.size is described twice; keep what Below says of it"):
        descriptions(Again)
    assert attributes("No entries.") == {}
