"""A run's configuration as a form: a field for each key, explained by what the configuration's own docstrings say.

What was typed is kept as text until all of it is understood, so a form with mistakes is shown again as it was sent.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct

from coordinator.config import RunConfig, run_config
from edge_runtime.config_file import read_struct
from edge_runtime.described import descriptions
from edge_runtime.errors import ConfigError

#: Keys that stand first; all others are folded below, in the order of the configuration.
FIRST = (
    *("name", "package", "publisher_key", "rounds", "devices_per_round", "min_devices", "min_results"),
    *("steps", "batch_size", "draws", "sequence_limit", "seed"),
    *("local_optimizer.slice_rate", "local_optimizer.head_rate"),
    *("server_optimizer.slices.name", "server_optimizer.slices.rate"),
    *("server_optimizer.head.name", "server_optimizer.head.rate", "evaluation.data"),
)
#: Beginning of every field's name in a form, which has other fields too.
PREFIX = "run."
MOST_TEXT = 4096


@dataclass(frozen=True)
class Field:
    """A key of the configuration in a form.

    Attributes:
        path: the key, with its tables before it.
        meaning: what it means.
        choices: values that it may have, where they are few; empty for free text.
        default: what it is unless it is set, as text; empty if it is unset then, or required.
        required: whether it must be set.
        text: what was typed, or the value that is proposed.
        error: what is wrong with that; empty if nothing is.
    """

    path: str
    meaning: str
    choices: tuple[str, ...]
    default: str
    required: bool
    text: str
    error: str

    @property
    def name(self) -> str:
        """Name of the form's field."""
        return PREFIX + self.path

    @property
    def is_first(self) -> bool:
        """Whether it stands above the fold."""
        return self.path in FIRST


@dataclass(frozen=True)
class Key:
    """A key as the configuration's structs define it."""

    path: str
    type: Any
    meaning: str
    required: bool
    default: Any


def _keys(struct: type[Struct], path: str, *, optional: bool = False) -> Iterator[Key]:
    meanings = descriptions(struct)
    for field in msgspec.structs.fields(struct):
        inner = next((part for part in (field.type, *get_args(field.type)) if _is_struct(part)), None)
        if inner is not None:
            yield from _keys(inner, f"{path}{field.encode_name}.", optional=field.default is None)
            continue
        default = field.default if field.default is not NODEFAULT else None
        if field.default_factory is not NODEFAULT:
            default = field.default_factory()
        meaning = meanings[field.name].replace("``", "")
        yield Key(
            f"{path}{field.encode_name}",
            field.type,
            meaning[0].upper() + meaning[1:],
            field.required and not optional,
            default,
        )


def _is_struct(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Struct)


KEYS: Mapping[str, Key] = {key.path: key for key in _keys(RunConfig, "")}


def fields(texts: Mapping[str, str], errors: Mapping[str, str]) -> list[Field]:
    """The form's fields, those that stand first in their order.

    Args:
        texts: what was typed, or is proposed, by key.
        errors: what is wrong, by key.
    """
    order = {path: place for place, path in enumerate(FIRST)}
    found = [
        Field(
            path=key.path,
            meaning=key.meaning,
            choices=_choices(key),
            default="" if key.default is None else _text(key.default),
            required=key.required,
            text=texts.get(key.path, ""),
            error=errors.get(key.path, ""),
        )
        for key in KEYS.values()
    ]
    return sorted(found, key=lambda field: order.get(field.path, len(order)))


def read_form(form: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], RunConfig | None]:
    """What was typed by key, what is wrong by key, and the configuration if nothing is.

    What is wrong with the whole stands beside the key that it names first, or under the empty key.
    """
    texts = {path: form.get(PREFIX + path, "").strip() for path in KEYS}
    errors: dict[str, str] = {}
    table: dict[str, Any] = {}
    for key in KEYS.values():
        text = texts[key.path]
        if not text:
            if key.required:
                errors[key.path] = "this must be set"
            continue
        value, error = _value(key, text)
        if error:
            errors[key.path] = error
        else:
            _put(table, key.path, value)
    evaluation = table.get("evaluation")
    if evaluation is not None and "data" not in evaluation:
        errors.setdefault("evaluation.data", "this must be set where another key of evaluation is")
    for path, is_there, what in (
        ("package", Path.is_dir, "folder"),
        ("evaluation.data", Path.is_file, "file"),
    ):
        if texts[path] and path not in errors and not _is_there(Path(texts[path]), is_there):
            errors[path] = f"{path} names {texts[path]}, which is no {what} on the coordinator's machine"
    if errors:
        return texts, errors, None
    try:
        return texts, {}, run_config(table)
    except ConfigError as error:
        return texts, {named_key(str(error)): str(error)}, None


def _is_there(path: Path, is_there: Callable[[Path], bool]) -> bool:
    try:
        return is_there(path)
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_text(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Texts of a form's fields from a run.toml, and what is wrong with the file, by key.

    Raises:
        ConfigError: it is no TOML, or has a key that there is not.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"the file is not TOML: {error}") from error
    found = dict(_flat(table, ""))
    if unknown := sorted(set(found) - set(KEYS)):
        raise ConfigError(
            f"the file has a key {unknown[0]!r} that no run has; docs/configuration.md lists them"
        )
    texts = {path: _text(value) for path, value in found.items()}
    _, errors, _ = read_form({PREFIX + path: value for path, value in texts.items()})
    return texts, errors


def texts_of(config: RunConfig) -> dict[str, str]:
    """Texts of a form's fields for a configuration, without those at their defaults."""
    found = dict(_flat(msgspec.to_builtins(config), ""))
    return {
        path: _text(value)
        for path, value in found.items()
        if value is not None and (KEYS[path].required or _text(value) != _text(KEYS[path].default))
    }


def named_key(message: str) -> str:
    """The key that a message names first, one with its value before others; empty if it names none."""
    for ending in (" = ", r"(?![\w.])"):
        places = {
            path: match.start()
            for path in KEYS
            if (match := re.search(rf"(?<![\w.]){re.escape(path)}{ending}", message)) is not None
        }
        if places:
            return min(places, key=lambda path: (places[path], -len(path)))
    return ""


def _flat(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _put(table: dict[str, Any], path: str, value: Any) -> None:
    *tables, name = path.split(".")
    for each in tables:
        table = table.setdefault(each, {})
    table[name] = value


def _value(key: Key, text: str) -> tuple[Any, str]:
    """A value of what was typed, or what is wrong with it."""
    if len(text) > MOST_TEXT:
        return None, f"this has {len(text)} characters, over the limit of {MOST_TEXT}"
    for candidate in _readings(text):
        if _fits(key.type, candidate):
            return candidate, ""
    table: dict[str, Any] = {}
    _put(table, key.path, next(_readings(text)))
    return None, _complaint(key, table)


def _readings(text: str) -> Iterator[Any]:
    """What a text may stand for: a number, a truth value, itself, or a list of such."""
    for candidate in (text, f"[{text}]"):
        try:
            yield json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    yield text
    yield [part.strip() for part in text.split(",") if part.strip()]


def _fits(kind: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError):
        return False
    return True


def _complaint(key: Key, table: dict[str, Any]) -> str:
    """What the configuration's reader says of a value, without the keys that are missing beside it."""
    *tables, _ = key.path.split(".")
    whole: dict[str, Any] = {**_REQUIRED, **table}
    if tables == ["evaluation"]:
        whole["evaluation"] = {"data": "rows.jsonl", **table["evaluation"]}
    try:
        read_struct(whole, RunConfig)
    except ConfigError as error:
        return str(error)
    return "this is no value for the key"


#: Values for what must be set, so that a complaint is about the one key that is asked about.
_REQUIRED: dict[str, Any] = {
    "name": "a",
    "package": "a",
    "publisher_key": "A" * 43 + "=",
    "rounds": 1,
    "devices_per_round": 1,
    "seed": 0,
    "steps": 1,
    "batch_size": 1,
}


def _choices(key: Key) -> tuple[str, ...]:
    if key.type is bool:
        return ("true", "false")
    kinds = [key.type] if get_origin(key.type) is Literal else get_args(key.type)
    if any(kind is not type(None) and get_origin(kind) is not Literal for kind in kinds):
        return ()
    return tuple(_text(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))


def _text(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return json.dumps(value)
