"""Python code that a model folder asks to run (``auto_map``): refused unless the operator lets it and it is here.

transformers runs such code only if it is trusted, and otherwise takes a class of its own where it knows the
architecture. ``auto_map`` may name a module of the folder, or one of another repository (``OWNER/NAME--MODULE.CLASS``),
which is then not in the folder; this program downloads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError
from export.model.architecture import has_folder
from export.model.json_file import read_json_object

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
BY_ITSELF = "use a model that transformers knows by itself"
#: Architectures that transformers has under another name than the code that they came with.
OWN_NAMES = {"new": "gte"}


def check_code(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> tuple[str, ...]:
    """Refuse a folder that works with code alone that may not run, or is not here.

    Args:
        folder: model folder.
        config: content of its config.json.
        trust_remote_code: whether the operator lets the code run.

    Returns:
        A sentence for people if the folder names code and works without it.

    Raises:
        ModelError: it does not; says where the code is and what to do.
    """
    files = {CONFIG: config}
    if (folder / TOKENIZER_CONFIG).is_file():
        files[TOKENIZER_CONFIG] = read_json_object(folder / TOKENIZER_CONFIG)
    notes = []
    for name, content in files.items():
        named = content.get("auto_map")
        if not named:
            continue
        kind = str(config.get("model_type"))
        if name == CONFIG and not trust_remote_code and has_folder(kind):
            notes.append(
                f"The code that {name} names (auto_map) is not run: transformers knows {kind} by itself"
            )
            continue
        if (away := _not_here(named)) is not None:
            known = OWN_NAMES.get(kind)
            hint = "" if known is None else f" (this architecture is {known} there)"
            raise ModelError(
                f"{folder / name} asks to run Python code of another repository, {away} (auto_map), which is not in "
                f"the folder, and nothing is downloaded; {BY_ITSELF}{hint}, or load the model once with transformers "
                "and trust_remote_code=True, which keeps the code, and give --trust-remote-code"
            )
        if not trust_remote_code:
            raise ModelError(
                f"{folder / name} asks to run Python code of the folder's own (auto_map); read that code, then give "
                f"--trust-remote-code, or {BY_ITSELF}"
            )
    return tuple(notes)


def _not_here(named: object) -> str | None:
    """The first other repository whose code is named and that the library's cache does not hold."""
    for reference in _references(named):
        repository, joint, module = reference.partition("--")
        if joint and not _is_cached(repository, f"{module.partition('.')[0]}.py"):
            return repository
    return None


def _references(named: object) -> Iterator[str]:
    """References to classes in ``auto_map``, a tokenizer's slow and fast one among them."""
    if isinstance(named, str):
        yield named
    elif isinstance(named, Mapping):
        for value in named.values():
            yield from _references(value)
    elif isinstance(named, list | tuple):
        for value in named:
            yield from _references(value)


def _is_cached(repository: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        return isinstance(try_to_load_from_cache(repository, file), str)
    except HFValidationError:  # no name of a repository
        return False
