"""``run new``: a run.toml for a package, with every key and what it means, taken from where the keys are defined."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import NODEFAULT, Struct

from coordinator.config import RunConfig, read_run_config
from edge_runtime.described import descriptions
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.package import Package

WIDTH = 110
STEPS = 8
#: Form of a row for evaluations, by whether the package has labels.
ROWS = {True: '{"text": "…", "label": "…"}, with labels of the package', False: '{"text": "…"} alone'}


def write_run_file(
    package: Path, output: Path, *, publisher_key: str, evaluation_data: Path | None
) -> RunConfig:
    """Write a configuration with which a run of the package can be created as it stands.

    Args:
        package: folder of the package.
        output: file to write; paths in it are relative to its folder where they can be.
        publisher_key: public key that must have signed the package.
        evaluation_data: file of rows for evaluations; None leaves that table as a comment.

    Returns:
        the configuration, read back from the file.

    Raises:
        ConfigError: the file exists, its folder does not, or a path that is named does not.
        ArtefactError: the package is malformed, or was not signed with the key.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; choose another --output, or remove it")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"the folder of --output {output} does not exist; make it, or choose another")
    if not package.is_dir():
        raise ConfigError(f"{package} is no folder; give the one that edge-export package wrote")
    if evaluation_data is not None and not evaluation_data.is_file():
        raise ConfigError(f"--evaluation-data {evaluation_data} is no file")
    manifest = Package.open(package, publisher_key).manifest
    folder = output.absolute().parent
    chosen = choices(manifest, _relative(package, folder), publisher_key)
    if evaluation_data is not None:
        chosen["evaluation"] = {"data": _relative(evaluation_data, folder)}
    output.write_text(run_file(manifest, chosen), "utf-8")
    return read_run_config(output)


def choices(manifest: Manifest, package: str, publisher_key: str) -> dict[str, Any]:
    """The keys that are set for a package; all others stand in the file as comments with their defaults."""
    head = manifest.head is not None
    adam = {"name": "adam", "rate": 0.2, "tau": 1e-4}
    local = {"slice_rate": 1 / STEPS}
    server: dict[str, Any] = {"slices": adam}
    if head:
        local["head_rate"] = 1 / STEPS
        server["head"] = {"name": "adam", "rate": 0.01}
    return {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", manifest.name).strip("._-")[:64] or "run",
        "package": package,
        "publisher_key": publisher_key,
        "rounds": 20,
        "devices_per_round": 10,
        "seed": 0,
        "steps": STEPS,
        "batch_size": 8,
        "draws": 4,
        "sequence_limit": manifest.sequence_limit,
        "train_head": head,
        "local_optimizer": local,
        "server_optimizer": server,
    }


def run_file(manifest: Manifest, chosen: dict[str, Any]) -> str:
    """The text of a run.toml.

    Args:
        manifest: manifest of the package.
        chosen: values to set, by key; tables as dictionaries.
    """
    names = [spec.name for spec in manifest.slices if spec.kind != "head"]
    about = (
        f"A run of package {manifest.name} ({manifest.task}). Keys with a # before them have the value that is shown "
        "unless they are set. Rates are a start and no more: edge-coordinator simulate compares settings. "
        f"Slices of the package: {', '.join(names) or 'none'}. Rows for evaluations are lines of the form "
        f"{ROWS[bool(manifest.labels)]}."
    )
    return "\n".join([*_comment(about), "", *_table(RunConfig, chosen, "")])


def _table(struct: type[Struct], chosen: dict[str, Any] | None, path: str) -> Iterator[str]:
    """A table's lines: keys that are set first, then the others, then the tables within.

    Args:
        struct: struct that the table is read into.
        chosen: values to set; None makes the whole table a comment.
        path: name of the table with a dot behind it; empty for the file itself.
    """
    meanings = descriptions(struct)
    set_here = {} if chosen is None else chosen
    tables, keys = [], []
    for field in msgspec.structs.fields(struct):
        inner = _inner(field.type)
        if inner is None:
            keys.append(field)
        else:
            tables.append((field, inner))
    own = vars(struct).get("__annotations__", {})
    for field in sorted(
        keys, key=lambda f: (f.encode_name not in set_here, not f.required, f.name not in own)
    ):
        name = field.encode_name
        yield from _comment(_sentence(meanings[field.name]))
        if name in set_here:
            yield f"{name} = {toml(set_here[name])}"
        else:
            yield f"# {name} = {_default(field)}"
        yield ""
    for field, inner in tables:
        name = f"{path}{field.encode_name}"
        below = set_here.get(field.encode_name)
        optional = field.default is None and below is None
        yield from _comment(_sentence(meanings[field.name]))
        if not all(_inner(each.type) for each in msgspec.structs.fields(inner)):
            yield f"{'# ' if optional else ''}[{name}]"
        yield from _table(inner, None if optional else below or {}, f"{name}.")


def _inner(annotation: object) -> type[Struct] | None:
    """The struct that a key holds as a table; None for a plain value."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Struct):
            return part
    return None


def _default(field: msgspec.structs.FieldInfo) -> str:
    """What a key that is left out stands for, as TOML has it."""
    if field.required:
        return '"…"'
    value = field.default if field.default is not NODEFAULT else field.default_factory()
    return "…  (unset)" if value is None else toml(value)


def toml(value: object) -> str:
    """A plain value as TOML has it."""
    return json.dumps(value, ensure_ascii=False)


def _sentence(meaning: str) -> str:
    """A meaning without the marks of docstrings."""
    plain = meaning.replace("``", "")
    return plain[0].upper() + plain[1:]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False)]


def _relative(path: Path, folder: Path) -> str:
    """A path as the file has it: from the file's own folder."""
    return os.path.relpath(path.absolute(), folder)
