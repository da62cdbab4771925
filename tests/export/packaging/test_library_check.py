"""The captured model beside the one that transformers loads."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_runtime.data.batches import NOT_PREDICTED, Batch
from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import TaskKind
from export.model.load import load_model
from export.model.slices import SliceOptions
from export.packaging import library_check
from export.packaging.library_check import LIBRARY_LIMIT, LibraryModel, check_against_library
from export.quantisation.stored import StoredModel, StoredTensors, store
from tests.export import tiny

Captured = Callable[[str, TaskKind], tuple[LibraryModel, StoredModel]]
#: Kinds of slices by model: an encoder, decoders with an output layer of their own and with a shared one.
MODELS: dict[tuple[str, TaskKind], str] = {
    ("bert", "classification"): "lora_xs",
    ("llama", "classification"): "lora",
    ("llama", "causal_lm"): "lora",
    ("gpt2", "causal_lm"): "lora_xs",
}
TARGETS = {"bert": "query", "gpt2": "c_attn"}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Models as both sides have them, each captured once; slices are not at zero, and must not matter."""

    @functools.cache
    def make(family: str, task: TaskKind) -> tuple[LibraryModel, StoredModel]:
        folder = tiny.write_model(tmp_path_factory.mktemp(family) / "model", family, task)
        options = SliceOptions(kind=MODELS[family, task], targets=(TARGETS.get(family, "q_proj"),), rank=2)
        model = load_model(folder, 3 if task == "classification" else 0, options, task)
        library = LibraryModel.of(folder, model, trust_remote_code=False)
        return library, store(model, "none")

    return make


def batch(task: TaskKind) -> Batch:
    """Three rows of different lengths."""
    lengths = (9, 4, 6)
    generator = np.random.default_rng(1)
    ids = np.zeros((3, 9), np.int64)
    mask = np.zeros((3, 9), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = generator.integers(5, 60, length)
        mask[row, :length] = 1
    labels = np.arange(3)
    if task == "causal_lm":
        labels = np.where(np.roll(mask, -1, 1) * mask, np.roll(ids, -1, 1), NOT_PREDICTED)
        labels[:, -1] = NOT_PREDICTED
    return Batch(ids, mask, labels)


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_both_compute_the_same(captured: Captured, family: str, task: TaskKind) -> None:
    """A padded batch through the captured model gives what each row gives alone in the library's model."""
    assert check_against_library(*captured(family, task), batch(task)) < LIBRARY_LIMIT / 10


class Misread(StoredTensors):
    """Tensors of a folder, one of which is read wrongly."""

    def __init__(self, tensors: StoredTensors, name: str) -> None:
        self.__dict__ = tensors.__dict__ | {"_misread": name}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        return tensor * 1.01 if name == self._misread else tensor


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("causal_lm", "encoder.model.layers.1.mlp.up_proj.weight"),
        ("causal_lm", "encoder.model.norm.weight"),
        ("classification", "encoder.layers.0.self_attn.v_proj.weight"),
    ],
)
def test_a_weight_that_is_read_wrongly_is_refused(captured: Captured, task: TaskKind, name: str) -> None:
    """One matrix that is off by a hundredth is enough, for either task."""
    library, stored = captured("llama", task)
    assert name in {source for segment in stored.plain for source in segment.weights.values()}
    with pytest.raises(ModelError, match=r"disagrees with the model that transformers loads from it, by \d"):
        check_against_library(library, replace(stored, tensors=Misread(stored.tensors, name)), batch(task))


def test_of_a_large_model_the_first_blocks_are_compared(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library may hold little, one block is loaded, and a fault in it is still seen; later ones are not."""
    monkeypatch.setattr(library_check, "LIBRARY_BYTES", 1)
    library, stored = captured("llama", "causal_lm")
    assert library.blocks(stored.plain) == 1
    rows = batch("causal_lm")
    assert check_against_library(library, stored, rows) < LIBRARY_LIMIT / 10
    later = Misread(stored.tensors, "encoder.model.layers.1.mlp.up_proj.weight")
    assert check_against_library(library, replace(stored, tensors=later), rows) < LIBRARY_LIMIT / 10
    first = Misread(stored.tensors, "encoder.model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ModelError, match="disagrees"):
        check_against_library(library, replace(stored, tensors=first), rows)


def test_tied_weights_count_once(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding that is the output layer too is held once: both blocks fit into just the model's own size."""
    library, stored = captured("gpt2", "causal_lm")
    parameters = sum(tensor.numel() for tensor in load_file(library.folder / "model.safetensors").values())
    monkeypatch.setattr(library_check, "LIBRARY_BYTES", 4 * parameters)
    assert library.blocks(stored.plain) == 2
    monkeypatch.setattr(library_check, "LIBRARY_BYTES", 4 * parameters - 4)
    assert library.blocks(stored.plain) == 1


def test_what_the_library_does_not_find_is_refused(captured: Captured, tmp_path: Path) -> None:
    """If the library itself lacks a weight and would draw it at random, that is told by name."""
    library, _ = captured("llama", "causal_lm")
    folder = Path(shutil.copytree(library.folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"transformers itself finds no model\.norm\.weight in .*, of 1 tensors"
    ):
        replace(library, folder=folder).outputs(batch("causal_lm"), {}, None)


def test_a_folder_that_the_library_cannot_load_is_refused(captured: Captured, tmp_path: Path) -> None:
    """An error of the library becomes one line with the folder."""
    library, _ = captured("llama", "causal_lm")
    folder = Path(shutil.copytree(library.folder, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model cannot be loaded by transformers: ") as caught:
        replace(library, folder=folder).outputs(batch("causal_lm"), {}, None)
    assert "\n" not in str(caught.value)
