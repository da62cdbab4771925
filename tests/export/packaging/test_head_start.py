"""A folder's own classifier is taken only if it computes what the library makes of the folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.model.load import load_model
from export.model.own_head import UnusableHead
from export.model.slices import SliceOptions
from export.packaging.head_start import HeadStart
from export.quantisation.stored import store
from tests.export import classifiers, tiny

IDS = [[5, 9, 7, 11, 6], [8, 7, 9]]


def settle(
    folder: Path, labels: tuple[str, ...], ids: list[list[int]] = IDS
) -> tuple[str, torch.Tensor, list[str]]:
    """How features are made in the end, the head's start, and what was told."""
    load = partial(load_model, folder, len(labels), SliceOptions(rank=2))
    start = HeadStart(folder, labels, load, trust_remote_code=False)
    model = start.load()
    told: list[str] = []
    model, stored = start.settle(model, store(model, "none"), "none", ids, told.append)
    return str(model.features), stored.tensors["head.weight"], told


def test_rows_follow_the_labels(tmp_path: Path) -> None:
    """The classifier of a folder that orders the same labels otherwise starts with each label's own row."""
    model = classifiers.write_classifier(tmp_path / "model", "bert", ("mixed", "bad", "good"))
    features, weight, told = settle(model, tiny.LABELS)
    assert features == "own"
    assert torch.equal(weight, load_file(model / "model.safetensors")["classifier.weight"][[1, 2, 0]])
    assert told[-1].endswith("own classifier; its rows are put in the order of --labels")


def test_one_that_the_library_computes_otherwise_is_not_used(tmp_path: Path) -> None:
    """Where texts end with the padding token, the library looks at the token before, and a new head starts at zero."""
    model = classifiers.write_classifier(tmp_path / "model", "llama", tiny.LABELS)
    features, weight, told = settle(model, tiny.LABELS, [[5, 9, 7, 0]])
    assert (features, int(weight.count_nonzero())) == ("last", 0)
    assert told[-1].startswith(
        "The folder's own classifier is not used, and a new head starts at zero: its logits"
    )


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("classifier.bias", "the weights lack classifier.bias"),
        ("bert.pooler.dense.weight", "lack pooler.dense"),
    ],
)
def test_one_that_is_not_whole_is_not_used(tmp_path: Path, lost: str, reason: str) -> None:
    """A classifier without its bias, or without the pooler before it, cannot be had, and the model gets a new head."""
    model = classifiers.write_classifier(tmp_path / "model", "bert", tiny.LABELS)
    tensors = load_file(model / "model.safetensors")
    del tensors[lost]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    load = partial(load_model, model, 3, SliceOptions(rank=2))
    with pytest.raises(UnusableHead, match=reason):
        load(features="own")
    loaded = HeadStart(model, tiny.LABELS, load, trust_remote_code=False).load()
    assert (loaded.features, loaded.classifier) == ("mean", None)
    assert int(loaded.tensor("head.weight").count_nonzero()) == 0
