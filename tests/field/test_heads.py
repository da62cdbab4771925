"""Classifiers that people bring in their model folders, and what loads the result.

A row is a situation; the public thread that tells of it stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from export.adapters.merge import Merged, merge
from export.adapters.write import write_adapter
from tests.export import classifiers, tiny, unlowered
from tests.export.classifiers import Alone

LABELS = ("bad", "good", "mixed")
#: The folders' order of the same labels.
OTHER_ORDER = ("mixed", "bad", "good")
#: Families whose trained classifier goes on: unslothai/unsloth-zoo#1087, huggingface/trl#297.
OWN = ("bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "modernbert", "llama", "gpt2")
#: Families with a fresh head in a folder that has a classifier for other labels; both poolings.
FRESH = ("bert", "llama")


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
        model = classifiers.write_classifier(folder / "model", family, theirs)
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
