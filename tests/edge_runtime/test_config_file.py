"""Sizes in configuration files and on command lines."""

from __future__ import annotations

import pytest

from edge_runtime.config_file import parse_bytes, parse_cap
from edge_runtime.errors import ConfigError


@pytest.mark.parametrize("text", ["256M", "256 MiB", "256mb", 268435456, "262144K"])
def test_every_spelling_of_a_size_is_binary(text: str | int) -> None:
    """A unit is of 1024 with or without the i, so that one size has one value however it is typed."""
    assert parse_bytes(text) == parse_cap(text) == 256 << 20


@pytest.mark.parametrize(
    ("cap", "answer"),
    [
        ("256", 'a cap of 256 bytes is less than any program takes; did you mean "256M"?'),
        (256, 'did you mean "256M"?'),
        ("256K", 'a cap of 256.0 KiB is less than any program takes; did you mean "256M"?'),
        ("1048575", 'write it with a unit, as "256M"'),
    ],
)
def test_a_cap_without_its_unit_is_answered_with_the_unit(cap: str | int, answer: str) -> None:
    """What is below 1 MiB is a slip; the message proposes a size that is accepted when it is typed."""
    with pytest.raises(ConfigError) as caught:
        parse_cap(cap)
    assert answer in str(caught.value)
    proposed = str(caught.value).rpartition('"')[0].rpartition('"')[2]
    assert parse_cap(proposed) >= 1 << 20


def test_the_least_cap_is_taken() -> None:
    """1 MiB itself is left to the planner to refuse."""
    assert parse_cap("1M") == 1 << 20
