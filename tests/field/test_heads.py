"""Classifiers that people bring in their model folders, and what loads the result.

A row is a situation; the public thread that tells of it stands beside it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from edge_runtime.errors import ModelError
from export.adapters.merge import Merged, merge
from export.adapters.read import Adapter, Wanted, read_adapter
from export.adapters.saved_head import folder_with_head, order_of_classes
from export.adapters.start_values import start_values
from export.adapters.write import write_adapter
from export.model.features import choose_features
from export.model.folder import check_model_folder
from tests.export import classifiers, peft_models, tiny, unlowered
from tests.export.classifiers import Alone

pytestmark = pytest.mark.filterwarnings(peft_models.OLD_NAME)
LABELS = ("bad", "good", "mixed")
#: The folders' order of the same labels.
OTHER_ORDER = ("mixed", "bad", "good")
#: Families whose trained classifier goes on, one of each form: unslothai/unsloth-zoo#1087, huggingface/trl#297.
OWN = ("bert", "roberta", "distilbert", "llama")
#: What a family calls its number of blocks, if not as most do.
LAYERS = {"distilbert": "n_layers"}
#: Families with a fresh head in a folder that has a classifier for other labels.
FRESH = ("bert",)


@dataclass(frozen=True)
class Trained:
    """A package after a run, what the exporter made of it, and what that predicts.

    Attributes:
        ours: the package's logits.
        untrained: the same before the slices were trained.
        adapter: logits of the adapter on the base model.
        merged: logits of the merged folder.
        done: outcome of the merge.
    """

    ours: np.ndarray
    untrained: np.ndarray
    adapter: np.ndarray
    merged: np.ndarray
    done: Merged


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Trained]:
    """By family and whether its own classifier goes on; all folders are loaded by one process without this project."""
    made, jobs = {}, []
    for family, own in (*((family, True) for family in OWN), *((family, False) for family in FRESH)):
        folder = tmp_path_factory.mktemp(family)
        theirs = OTHER_ORDER if own else ("x", "y", "z")
        one_block = {LAYERS.get(family, "num_hidden_layers"): 1}
        model = classifiers.write_classifier(folder / "model", family, theirs, **one_block)
        targets = classifiers.TARGETS.get(family, ())
        package = unlowered.make(model, folder / "package", LABELS, targets, own=own)
        values, batch = package.values(), tiny.make_text_batch(package.package, tiny.SENTENCES[:4])
        write_adapter(package.package, values, folder / "adapter", str(model))
        done = merge(package.package, values, model, folder / "merged")
        how = "class" if own else "loader"
        jobs += [
            Alone(how, folder / "adapter", batch, LABELS, model),
            Alone(how, folder / "merged", batch, LABELS),
        ]
        start = {name: value if name.startswith("head/") else 0 * value for name, value in values.items()}
        made[family, own] = package.logits(values, batch), package.logits(start, batch), done
    found = classifiers.predict_alone(jobs)
    return {
        name: Trained(ours, untrained, found[2 * place], found[2 * place + 1], done)
        for place, (name, (ours, untrained, done)) in enumerate(made.items())
    }


@pytest.mark.parametrize(
    ("family", "own"), [*((family, True) for family in OWN), *((family, False) for family in FRESH)]
)
def test_what_is_written_predicts_alone_what_the_package_predicts(
    trained: dict[tuple[str, bool], Trained], family: str, own: bool
) -> None:
    """The adapter on its base model and the merged folder give the package's logits, without this project."""
    found = trained[family, own]
    assert np.abs(found.ours - found.untrained).max() > 1e-3
    np.testing.assert_allclose(found.adapter, found.ours, atol=1e-5)
    np.testing.assert_allclose(found.merged, found.ours, atol=1e-5)


def test_a_classifier_that_was_not_trained_does_not_stay_beside_changed_layers(
    trained: dict[tuple[str, bool], Trained],
) -> None:
    """The merged folder holds no tensor of the old classifier, says which, and is of the class without one."""
    done = trained["bert", False].done
    assert done.taken_out == ("classifier.bias", "classifier.weight")
    with safe_open(done.folder / "model.safetensors", framework="numpy") as file:
        assert not set(done.taken_out) & set(file.keys())
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}


def test_a_merged_classifier_states_the_labels_of_its_rows(
    trained: dict[tuple[str, bool], Trained],
) -> None:
    """The label maps of a merged folder name the package's labels in the order of the classifier's rows."""
    config = json.loads((trained["bert", True].done.folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(index): label for index, label in enumerate(LABELS)}
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}


#: Families whose adapters bring a classifier: huggingface/sentence-transformers#3980, huggingface/peft#2289.
BRINGING = ("bert", "roberta", "llama")


def bring(family: str, folder: Path) -> tuple[Path, Path]:
    """A model folder without a classifier, and peft's adapter of the class with one, every number of it moved."""
    whole = classifiers.write_classifier(
        folder / "whole", family, OTHER_ORDER, **{LAYERS.get(family, "num_hidden_layers"): 1}
    )
    base = Path(shutil.copytree(whole, folder / "base"))
    AutoModelForSequenceClassification.from_pretrained(whole).base_model.save_pretrained(base)
    torch.manual_seed(11)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    tuned.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def adapter_of(base: Path, folder: Path, family: str) -> Adapter:
    """The adapter, for a classifier of LABELS."""
    return read_adapter(folder, Wanted(base, family, "classification", LABELS))


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    """By family, logits of peft and ours at the start; then of the package, its adapter and its merged folder."""
    ours, jobs = {}, []
    for family in BRINGING:
        folder = tmp_path_factory.mktemp(f"{family}-brought")
        base, start = bring(family, folder)
        adapter = adapter_of(base, start, family)
        order, said = order_of_classes(base, LABELS)
        assert (order, said) == (OTHER_ORDER, "; its rows are put in the order of --labels")
        assert adapter.saved_head is not None
        whole = folder_with_head(base, adapter.saved_head, order, folder / "with-head")
        package = unlowered.make(whole, folder / "package", LABELS, classifiers.TARGETS.get(family, ()))
        batch = tiny.make_text_batch(package.package, tiny.SENTENCES[:4])
        moved = package.values()
        slices = start_values(
            adapter, package.package.manifest.slices, lambda spec, _: pytest.fail(spec.name)
        )
        first = {**package.values(size=0.0), **slices}
        write_adapter(package.package, moved, folder / "trained", str(base))
        merge(package.package, moved, base, folder / "merged")
        jobs += [
            Alone("class", start, batch, LABELS, base),
            Alone("class", folder / "trained", batch, LABELS, base),
            Alone("class", folder / "merged", batch, LABELS),
        ]
        ours[family] = package.logits(first, batch), package.logits(moved, batch)
    alone = classifiers.predict_alone(jobs)
    return {
        family: [*ours[family], *alone[3 * place : 3 * place + 3]] for place, family in enumerate(BRINGING)
    }


@pytest.mark.parametrize("family", BRINGING)
def test_a_classifier_that_an_adapter_brings_is_gone_on_from(
    brought: dict[str, list[np.ndarray]], family: str
) -> None:
    """A package begins where peft's adapter is; what is written of it predicts, without this project, what it does."""
    first, moved, theirs, adapter, merged = brought[family]
    assert np.abs(first - moved).max() > 1e-2
    np.testing.assert_allclose(first, theirs, atol=1e-5)
    np.testing.assert_allclose(adapter, moved, atol=1e-5)
    np.testing.assert_allclose(merged, moved, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a trained classifier."""
    return classifiers.write_classifier(tmp_path_factory.mktemp("folder") / "model", "bert", LABELS)


def maps(*labels: str, **ids: int) -> dict[str, Any]:
    """Both label maps of a configuration; ``ids`` in the place of what ``labels`` give."""
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": ids or {label: index for index, label in enumerate(labels)},
    }


UNNAMED = maps("LABEL_0", "LABEL_1", "LABEL_2")
#: The folder's configuration, and what is told; the rows are None where the classifier is not used.
SITUATIONS = {
    # huggingface/trl#297: the very labels
    "the very labels": ({}, (0, 1, 2), "Training goes on from the folder's own classifier"),
    # huggingface/optimum#197: the model orders the labels otherwise than the data
    "another order": (maps("mixed", "good", "bad"), (2, 1, 0), "its rows are put in the order of --labels"),
    # huggingface/transformers#13298, huggingface/peft#310: trained, and never given names
    "no names": (UNNAMED, (0, 1, 2), "have no names but LABEL_0, …, and are taken in the order of --labels"),
    # none found
    "other labels": (maps("bad", "good", "ugly"), None, "others than those of --labels; only it has 'ugly'"),
    # huggingface/transformers#3093: a map that does not follow the number of classes
    "two unnamed classes": (
        {"id2label": None, "label2id": None},
        None,
        "has 2 classes, and there are 3 labels",
    ),
    # huggingface/transformers#13370: what a classifier was trained for
    "several labels a text": (
        {"problem_type": "multi_label_classification"},
        None,
        "was trained for multi_label_classification, not for one label a text",
    ),
    "a number": ({"problem_type": "regression"}, None, "was trained for regression"),
    # none found
    "another class": ({"architectures": ["BertForMaskedLM"]}, None, None),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_classifier_is_taken_or_named(folder: Path, tmp_path: Path, situation: str) -> None:
    """Whether a folder's classifier goes on, and with which rows, is told in one sentence."""
    changes, rows, said = SITUATIONS[situation]
    copy = classifiers.change_config(Path(shutil.copytree(folder, tmp_path / "model")), **changes)
    check_model_folder(copy, LABELS)
    choice = choose_features(copy, LABELS)
    assert choice.rows == rows
    assert (choice.own is None) if said is None else (said in str(choice.own))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (maps("bad", "good", "mixed", bad=0, good=2, mixed=1), "contradicts itself: id2label gives class 1"),
        (maps("bad", "good"), "names 2 labels (id2label) and --labels has 3"),
        (maps("LABEL_0"), "names 1 labels (id2label) and --labels has 3"),
    ],
)
def test_label_maps_that_cannot_be_right_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Maps that contradict each other or have another size are refused from the configuration alone."""
    copy = classifiers.change_config(Path(shutil.copytree(folder, tmp_path / "model")), **changes)
    with pytest.raises(ModelError) as caught:
        check_model_folder(copy, LABELS)
    assert message in str(caught.value)


def test_the_way_out_for_a_map_of_another_size_works(folder: Path, tmp_path: Path) -> None:
    """With both maps removed, as the message advises, the folder is accepted and its classifier named as not used."""
    copy = classifiers.change_config(
        Path(shutil.copytree(folder, tmp_path / "model")), id2label=None, label2id=None
    )
    check_model_folder(copy, ("a", "b", "c", "d"))
    assert "has 2 classes, and there are 4 labels" in str(choose_features(copy, ("a", "b", "c", "d")).own)
