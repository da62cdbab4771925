"""Paths that people name in the place of a folder: each is told where the folder is, and that folder is taken."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.errors import ModelError
from export.model.folder import check_model_folder
from export.model.whereabouts import elsewhere

LABELS = ("bad", "good", "mixed")


def steps(model: Path, folder: Path) -> Path:
    for step in (500, 1000):
        shutil.copytree(model, folder / f"checkpoint-{step}")
    return folder


def cache(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder / "snapshots" / "0a1b2c")
    (folder / "refs").mkdir()
    return folder


def modules(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder / "0_Transformer")
    (folder / "modules.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (steps, "checkpoint-1000"),  # huggingface/transformers#8886
        (cache, "snapshots/0a1b2c"),
        (modules, "0_Transformer"),
        (lambda model, folder: Path(shutil.copytree(model, folder)) / "config.json", ""),
        (lambda model, folder: Path(shutil.copytree(model, folder)) / "model.safetensors", ""),
    ],
    ids=["a training", "a hub's cache", "sentence-transformers", "a configuration", "weights"],
)
def test_the_folder_that_is_named_instead_is_taken(
    tiny_model: Path, tmp_path: Path, make: Callable[[Path, Path], Path], place: str
) -> None:
    """A training, a cache, an older layout and a file: the message names the folder to give, which is accepted."""
    with pytest.raises(ModelError) as caught:
        check_model_folder(make(tiny_model, tmp_path / "given"), LABELS)
    named = re.search(
        r"(?:the last of them is (\S+): give that|give the folder that it lies in, (\S+))$", str(caught.value)
    )
    assert named is not None, str(caught.value)
    folder = Path(named[1] or named[2])
    assert folder == tmp_path / "given" / place
    check_model_folder(folder, LABELS)


def test_a_name_on_a_hub_is_told_apart_from_a_path() -> None:
    """What may be a name on a hub gets the command that downloads it; a path does not."""
    said = elsewhere(Path("sentence-transformers/all-MiniLM-L6-v2"), "config.json")
    assert (
        "download it: hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir DIR, and give DIR"
        in said
    )
    assert elsewhere(Path("/nowhere/at/all"), "config.json") == ""
    assert elsewhere(Path("models/bert/v1"), "config.json") == ""
