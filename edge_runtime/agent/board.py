"""What is known of a kind of board: ``devices/boards/*.toml``, read like ``device.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from edge_runtime.agent.eligibility import Eligibility, check_eligibility
from edge_runtime.config_file import ByteSize, parse_bytes, parse_cap, read_struct, read_toml
from edge_runtime.errors import ConfigError
from edge_runtime.protocol.messages import Identifier

#: What a fact may be about.
Subject = Literal[
    "processor",
    "instruction sets",
    "memory",
    "memory cgroup",
    "page size",
    "thermal",
    "power",
    "storage",
    "trap",
]
Words = Annotated[str, Meta(min_length=1, max_length=400)]


class Fact(Struct, frozen=True, forbid_unknown_fields=True):
    """One fact.

    Attributes:
        about: what it is about.
        says: the fact.
        source: where it is from.
    """

    about: Subject
    says: Words
    source: Words


class BoardProfile(Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of board.

    Attributes:
        name: its maker's name for it.
        device_class: ``device_class`` of a device of this kind.
        models: beginnings of what its device tree calls it; empty for a generic one.
        cores: number of its cores.
        memory: memory of the smallest board of this name.
        cap: cap to begin with.
        dot_products: whether its cores are known to have dot products of 8-bit numbers.
        facts: what else is known, with sources.
        eligibility: what ``[eligibility]`` of a device of this kind may have to begin with; nothing is taken from here
            by itself.
    """

    name: Words
    device_class: Identifier
    models: tuple[Words, ...]
    cores: Annotated[int, Meta(ge=1, le=1024)]
    memory: ByteSize
    cap: ByteSize
    dot_products: bool
    facts: tuple[Fact, ...]
    eligibility: Eligibility = Eligibility()


def load_board(path: Path) -> BoardProfile:
    """Read a board's profile.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or a key is missing, unknown or out of its limits; names
            the file and the key.
    """
    table = read_toml(path)
    try:
        sizes = {
            name: parse(table[name])
            for name, parse in (("memory", parse_bytes), ("cap", parse_cap))
            if isinstance(table.get(name), str | int)
        }
        profile = read_struct({**table, **sizes}, BoardProfile)
        check_eligibility(profile.eligibility)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return profile
