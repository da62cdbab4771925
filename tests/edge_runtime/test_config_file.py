"""Configuration files: sizes with units, and what an error of each kind says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.config import RunConfig
from coordinator.simulation.config import SimulationConfig
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.config_file import parse_bytes, parse_cap, read_struct, read_toml
from edge_runtime.errors import ConfigError

RUN: dict[str, Any] = {
    "name": "a",
    "package": "p",
    "publisher_key": "A" * 43 + "=",
    "rounds": 1,
    "devices_per_round": 1,
    "seed": 0,
    "steps": 1,
    "batch_size": 1,
}
DEVICE: dict[str, Any] = {
    "coordinator_url": "u",
    "state_folder": "s",
    "data": "d",
    "device_name": "n",
    "device_class": "c",
    "publisher_key": "A" * 43 + "=",
    "cap": 1,
}
SAID = {
    "a choice": (
        {"directions": "one_slise"},
        "directions: 'one_slise' is none of: "
        "'dealt', 'filtered', 'gaussian', 'one_slice', 'orthogonal', 'per_example', 'shared'",
    ),
    "a choice in a table": (
        {"local_optimizer": {"name": "adam"}},
        "local_optimizer.name: 'adam' is none of: 'accumulate', 'adamw', 'sgc', 'sgd'",
    ),
    "a choice that may be unset": (
        {"evaluation": {"data": "d", "arithmetic": "int8"}},
        "evaluation.arithmetic: 'int8' is none of: 'block_int4', 'block_int8', 'float', 'row_int8'",
    ),
    "a choice or a list": ({"slices": "al"}, "slices: 'al' is none of: 'all', 'none', and no list"),
    "a slip of a key": ({"stepz": 1}, "unknown key 'stepz'; did you mean 'steps'?"),
    "a slip in a table": (
        {"server_optimizer": {"head": {"nam": "sgd"}}},
        "server_optimizer.head: unknown key 'nam'; did you mean 'name'?",
    ),
    "a slip in a wire struct": (
        {"local_optimizer": {"head_rat": 1.0}},
        "local_optimizer: unknown key 'head_rat'; did you mean 'head_rate'?",
    ),
    "a key of another table": (
        {"slice_rate": 1.0},
        "unknown key 'slice_rate'; it belongs into [local_optimizer]",
    ),
    "a key of the file in a table": (
        {"evaluation": {"data": "d", "rounds": 3}},
        "evaluation: unknown key 'rounds'; it belongs above the first table, at the top of the file",
    ),
    "a key like no other": (
        {"evaluation": {"data": "d", "xyz": 3}},
        "evaluation: unknown key 'xyz'; there are: data, every_rounds, threads, arithmetic, groups",
    ),
    "a missing key of a table": ({"evaluation": {}}, "evaluation: a key is missing: data"),
    "a bound": ({"rounds": -1}, "rounds is -1, it must be a whole number >= 0"),
    "a number in quotes": ({"rounds": "3"}, 'rounds is "3", it must be a whole number'),
    "a point": ({"steps": 3.5}, "steps is 3.5, it must be a whole number"),
    "a word for a switch": ({"train_head": "yes"}, 'train_head is "yes", it must be true or false'),
    "a time without end": (
        {"deadline_s": float("inf")},
        "deadline_s is inf, it must be a number <= 1000000.0",
    ),
    "a key that is cut": (
        {"publisher_key": "AAAA"},
        "publisher_key is \"AAAA\", it must be a public key, 44 characters as 'edge-export key' prints them",
    ),
    "a name with a space": (
        {"name": "my run"},
        "name is \"my run\", it must be a name of 1 to 64 letters, digits, '.', '_' and '-', of which the first is "
        "a letter or a digit",
    ),
    "a name for a table": (
        {"server_optimizer": "adam"},
        'server_optimizer is "adam", it must be a table',
    ),
    "a list for a name": ({"package": ["p"]}, "package is a list in brackets, it must be text in quotes"),
    "a figure in a table": (
        {"evaluation": {"data": "d", "every_rounds": "2"}},
        'evaluation.every_rounds is "2", it must be a whole number',
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_errors_name_the_way_out(case: str) -> None:
    """A value outside its choices names them, and an unknown key names the one that was meant or where it belongs."""
    changed, said = SAID[case]
    with pytest.raises(ConfigError) as caught:
        read_struct({**RUN, **changed}, RunConfig)
    assert str(caught.value) == said


def test_all_missing_keys_are_named_at_once() -> None:
    """Who starts from an empty file learns of every required key in one go."""
    with pytest.raises(ConfigError) as caught:
        read_struct({"name": "a", "rounds": 3}, RunConfig)
    said = str(caught.value)
    assert said == "keys are missing: seed, steps, batch_size, package, publisher_key, devices_per_round"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('name = "a"\n'.encode("utf-16"), "it is not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"),
        ('name = "é"\n'.encode("latin1"), "it is not UTF-8; convert it: iconv -f LATIN1 -t UTF-8"),
        (b'package = "C:\\models\\x"\n', "; write a path that has backslashes in single quotes"),
        ("name = “a”\n".encode(), '; write text in straight quotes, "…"'),
        (b'{"name": "a"}\n', "; it is JSON, and TOML has a line KEY = VALUE for each key"),
        (b"name = a\n", "Invalid value (at line 1, column 8)"),
    ],
)
def test_a_slip_that_is_no_toml_is_told(tmp_path: Path, data: bytes, said: str) -> None:
    """Another encoding, backslashes, typographic quotes and JSON are told with what to write instead."""
    (tmp_path / "run.toml").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_toml(tmp_path / "run.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'run.toml'} is not TOML: ")
    assert str(caught.value).endswith(said)


def test_a_token_is_not_quoted() -> None:
    """What is wrong with an enrolment token is told without the token, which is a secret."""
    with pytest.raises(ConfigError) as caught:
        read_struct(
            {**DEVICE, "enrolment_token": 4711}, DeviceConfig, dec_hook=lambda kind, value: kind(value)
        )
    assert str(caught.value) == "enrolment_token must be text in quotes"


def test_what_is_written_as_the_messages_say_is_read(tmp_path: Path) -> None:
    """A byte order mark is read over; a path in single quotes keeps its backslashes."""
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfpackage = 'C:\\models\\x'\n")
    assert read_toml(tmp_path / "run.toml") == {"package": "C:\\models\\x"}


def test_lists_of_tables_are_searched() -> None:
    """An unknown key in a list of tables is named with its place."""
    fleet, data = {"devices": 1, "cap": 1}, {"train": "t", "dev": "d", "partition": "iid"}
    arms = [{"name": "a", "package": "p"}, {"name": "b", "packge": "p"}]
    with pytest.raises(ConfigError) as caught:
        read_struct({"name": "s", "seeds": [0], "fleet": fleet, "data": data, "arms": arms}, SimulationConfig)
    assert str(caught.value) == "arms[1]: unknown key 'packge'; did you mean 'package'?"


def test_device_files_are_read_alike(tmp_path: Path) -> None:
    """device.toml is told of in the same words, with the file's name before them."""
    path = tmp_path / "device.toml"
    path.write_text('engin = "onnxruntime"\n')
    with pytest.raises(ConfigError, match=r"device.toml: unknown key 'engin'; did you mean 'engine'\?"):
        load_config(path)
    with pytest.raises(ConfigError, match="engine: 'torch' is none of: 'executorch', 'onnxruntime'"):
        read_struct({**DEVICE, "engine": "torch"}, DeviceConfig, dec_hook=lambda kind, value: kind(value))


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
