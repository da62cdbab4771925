"""A run.toml that is written for a package: complete, explained, and good as it stands."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.admin.new_run import write_run_file
from coordinator.config import RunConfig, read_run_config
from edge_runtime.described import descriptions
from edge_runtime.errors import ConfigError, SignatureError
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import ROW, World
from tests.edge_runtime.bigram import write_bigram


@pytest.fixture(params=["classification", "causal_lm"])
def task_world(world: World, request: pytest.FixtureRequest) -> World:
    """A coordinator beside a package of each kind, with rows that fit it."""
    if request.param == "causal_lm":
        world.package = write_bigram(world.folder / "bigram", world.publisher).package.folder
    (world.folder / "dev.jsonl").write_text(ROW if request.param == "classification" else '{"text": "a"}\n')
    return world


def written(world: World, *, evaluated: bool) -> Path:
    """The file for the world's package."""
    path = world.folder / f"run-{evaluated}.toml"
    data = world.folder / "dev.jsonl" if evaluated else None
    write_run_file(world.package, path, publisher_key=world.publisher.public_key, evaluation_data=data)
    return path


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_new_file_makes_a_run_as_it_stands(task_world: World, evaluated: bool) -> None:
    """What run new writes is accepted by run create, unchanged, for classifiers and for language models."""
    config = read_run_config(written(task_world, evaluated=evaluated))
    answer = task_world.admin("POST", "/v1/admin/runs", msgspec.to_builtins(config))
    assert answer.status_code == 201, answer.text
    assert (config.evaluation is not None) == evaluated
    task_world.fleet("a")
    task_world.play()
    assert task_world.devices["a"].task() is not None


def test_every_key_is_there_with_its_meaning(world: World) -> None:
    """Each key of a run stands in the file once, set or as a comment, below the words of its docstring."""
    text = written(world, evaluated=False).read_text()
    flat = re.sub(r"\n# ", " ", text)
    for struct, keys in structs_of(RunConfig):
        for name, meaning in descriptions(struct).items():
            words = meaning.replace("``", "").strip()
            assert words[1:40] in flat, (struct, name)
        for key in keys:
            assert re.search(rf"^(# )?{key} = ", text, re.MULTILINE), key
    assert all(len(line) <= 120 for line in text.splitlines())


def test_defaults_in_comments_are_the_defaults(world: World) -> None:
    """A file in which every commented default is made a setting is the same run."""
    (world.folder / "dev.jsonl").write_text(ROW)
    path = written(world, evaluated=True)
    text, privacy = path.read_text().split("# [privacy]")  # a table that stays a comment as a whole
    assert "# delta = 1e-05" in privacy
    uncommented = re.sub(r"^# (\w+ = (?!…|\"…\").*)$", r"\1", text, flags=re.MULTILINE)
    other = world.folder / "uncommented.toml"
    other.write_text(uncommented)
    assert len(tomllib.loads(uncommented)) > len(tomllib.loads(path.read_text())) + 10
    assert read_run_config(other) == read_run_config(path)


def structs_of(struct: type[msgspec.Struct]) -> Iterator[tuple[type[msgspec.Struct], list[str]]]:
    """A configuration's structs, each with its keys that are no tables."""
    from coordinator.admin.new_run import _inner

    fields = msgspec.structs.fields(struct)
    yield struct, [field.encode_name for field in fields if _inner(field.type) is None]
    for field in fields:
        inner = _inner(field.type)
        if inner is not None:
            yield from structs_of(inner)


def test_what_cannot_be_written_for_is_told(world: World) -> None:
    """A file that is there, a package that is not, a foreign key and missing rows are refused before a write."""
    key = world.publisher.public_key
    there = world.folder / "there.toml"
    there.write_text("precious")
    good: dict[str, Any] = {"publisher_key": key, "evaluation_data": None}
    cases: list[tuple[type[Exception], str, Path, Path, dict[str, Any]]] = [
        (ConfigError, "exists; choose another --output", world.package, there, good),
        (ConfigError, "is no folder", world.folder / "nope", world.folder / "a.toml", good),
        (ConfigError, "does not exist", world.package, world.folder / "no" / "a.toml", good),
        (
            ConfigError,
            "is no file",
            world.package,
            world.folder / "a.toml",
            {**good, "evaluation_data": Path("no")},
        ),
        (
            SignatureError,
            "was not made",
            world.package,
            world.folder / "a.toml",
            {**good, "publisher_key": generate_key().public_key},
        ),
    ]
    for kind, said, package, output, more in cases:
        with pytest.raises(kind, match=said):
            write_run_file(package, output, **more)
    assert there.read_text() == "precious"
    assert not (world.folder / "a.toml").exists()
