"""A classifier that peft saved, put into a model's folder; tests/field/test_heads.py compares predictions with peft."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from export.adapters.read import Pair, SavedHead
from export.adapters.saved_head import folder_with_head, order_of_classes
from export.model.load import load_model
from export.model.own_head import UnusableHead
from export.model.slices import SliceOptions
from tests.export import classifiers

LABELS = ("bad", "good", "mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a trained classifier."""
    return classifiers.write_classifier(tmp_path_factory.mktemp("folder") / "model", "bert", LABELS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task_type": "TOKEN_CLS"}, "it was trained for TOKEN_CLS"),
        (
            {"pairs": {"bert.pooler.dense": Pair(np.ones((1, 1)), np.ones((1, 1)))}},
            "bert.pooler.dense has a pair",
        ),
        ({"tensors": {"classifier.weight": np.ones((5, 64), np.float32)}}, "no layer with 3 rows"),
        (
            {
                "tensors": {
                    "bert.pooler.dense.bias": np.ones(64, np.float32),
                    "classifier.weight": np.ones((3, 64), np.float32),
                }
            },
            "it changes bert.pooler.dense.bias, which the folder has too, beside its last layer: merge it into",
        ),
    ],
)
def test_a_classifier_that_cannot_be_gone_on_from_is_named(
    folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """What an adapter's classifier lacks, or brings too much, is told in one line."""
    head = SavedHead("SEQ_CLS", {"classifier.weight": np.ones((3, 64), np.float32)}, {})
    with pytest.raises(UnusableHead) as caught:
        folder_with_head(folder, replace(head, **changes), LABELS, tmp_path / "made")
    assert reason in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_an_adapters_classifier_takes_the_place_of_the_folders_own(folder: Path, tmp_path: Path) -> None:
    """Where both have one, the adapter's is the start, as peft loads it; the folder's stays as it is in its place."""
    mine = {
        "classifier.weight": np.full((3, 64), 0.5, np.float32),
        "classifier.bias": np.ones(3, np.float32),
    }
    before = (folder / "model.safetensors").read_bytes()
    made = folder_with_head(folder, SavedHead("SEQ_CLS", mine, {}), LABELS, tmp_path / "made")
    assert (folder / "model.safetensors").read_bytes() == before
    model = AutoModelForSequenceClassification.from_pretrained(made)
    assert model.classifier.weight.eq(0.5).all()
    loaded = load_model(made, 3, SliceOptions(rank=2), features="own")
    assert loaded.tensor("head.weight").eq(0.5).all()
    assert not loaded.notes


@pytest.mark.parametrize(
    ("theirs", "order", "said"),
    [
        (("bad", "good", "mixed"), LABELS, ""),
        (("mixed", "good", "bad"), ("mixed", "good", "bad"), "; its rows are put in the order of --labels"),
        (
            ("LABEL_0", "LABEL_1"),
            LABELS,
            "; its classes have no names, and are taken in the order of --labels",
        ),
    ],
)
def test_classes_have_the_folders_labels_if_those_are_the_packages(
    folder: Path, tmp_path: Path, theirs: tuple[str, ...], order: tuple[str, ...], said: str
) -> None:
    """An adapter does not say which label a row is for: the model's folder does, or the order of --labels."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    classifiers.change_config(copy, id2label={str(i): label for i, label in enumerate(theirs)}, label2id=None)
    assert order_of_classes(copy, LABELS) == (order, said)
    made = folder_with_head(
        copy,
        SavedHead(None, {"classifier.weight": np.ones((3, 64), np.float32)}, {}),
        order,
        tmp_path / "made",
    )
    assert list(json.loads((made / "config.json").read_text())["id2label"].values()) == list(order)
