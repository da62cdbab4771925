"""How the features of a classifier's head are made, told from a model folder's files alone.

A folder with a trained classifier for the very labels goes on from it, by the pooling and the layers of its own class
(``own``). Otherwise a fresh head starts at zero, over the pooling that a sentence-transformers folder states, or over
what suits the model's attention.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import Features
from export.model.folder import CONFIG, read_config
from export.model.json_file import MAX_JSON_BYTES, read_json_object
from export.model.label_map import is_unnamed, read_id2label

MODULES = "modules.json"
#: What transformers calls its classes with a classifier for a whole text.
CLASSIFIER_CLASS = "ForSequenceClassification"
#: Poolings of sentence-transformers that a fresh head can have. Its features are scaled to one length, so that a mean
#: divided by the root of the length is the mean.
POOLINGS: dict[str, Features] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
    "cls": "first",
    "cls_token": "first",
    "lasttoken": "last",
}
_SWITCH = "pooling_mode_"
TAKEN = "Training goes on from the folder's own classifier"


@dataclass(frozen=True)
class FeatureChoice:
    """How features are made.

    Attributes:
        features: pooling of a fresh head; None where the model's attention decides.
        rows: rows of the folder's own classifier in the order of the labels; None if it cannot be used.
        own: sentence for people about that classifier: how it is taken, or why it is not; None where there is none.
        pooled: sentences for people about the pooling of a fresh head.
    """

    features: Features | None
    rows: tuple[int, ...] | None
    own: str | None = None
    pooled: tuple[str, ...] = ()


def choose_features(folder: Path, labels: tuple[str, ...]) -> FeatureChoice:
    """Decide how features are made.

    Args:
        folder: model folder.
        labels: label set, in order; empty for a causal language model, which has no head.

    Raises:
        ModelError: a file that says how features are made cannot be read, or contradicts itself.
    """
    if not labels:
        return FeatureChoice(features=None, rows=None)
    features, pooled = _read_pooling(folder)
    rows, own = _own_rows(folder, read_config(folder), labels)
    return FeatureChoice(features, rows, own, pooled)


def not_used(reason: str, whose: str = "folder's own") -> str:
    """The sentence that says why a classifier, the folder's own or an adapter's, is not used."""
    return f"The {whose} classifier is not used, and a new head starts at zero: {reason}"


def classifier_class(config: dict[str, Any]) -> str | None:
    """The class with a classifier for a whole text that a configuration names, or None."""
    named = config.get("architectures") or [None]
    return str(named[0]) if str(named[0]).endswith(CLASSIFIER_CLASS) else None


def _own_rows(
    folder: Path, config: dict[str, Any], labels: tuple[str, ...]
) -> tuple[tuple[int, ...] | None, str | None]:
    """Rows of the folder's classifier in the order of the labels, None if it cannot be used; and what to tell."""
    theirs = read_id2label(config, folder / CONFIG)
    if classifier_class(config) is None:
        return None, None
    kind = config.get("problem_type")
    if kind not in (None, "single_label_classification"):
        return None, not_used(f"it was trained for {str(kind)[:40]}, not for one label a text")
    if not theirs or is_unnamed(
        theirs
    ):  # transformers leaves the map out where it is that of two unnamed classes
        count = len(theirs) or 2
        if count != len(labels):
            return None, not_used(f"it has {count} classes, and there are {len(labels)} labels")
        note = f"{TAKEN}; its {count} classes have no names but LABEL_0, …, and are taken in the order of --labels"
        return tuple(range(count)), note
    if set(theirs) != set(labels):
        other = next(label for label in (*theirs, *labels) if (label in theirs) != (label in labels))
        side = "only it has" if other in theirs else "it lacks"
        return None, not_used(f"its labels are others than those of --labels; {side} {other[:60]!r}")
    order = "" if theirs == labels else "; its rows are put in the order of --labels"
    return tuple(theirs.index(label) for label in labels), TAKEN + order


def _read_pooling(folder: Path) -> tuple[Features | None, tuple[str, ...]]:
    """The pooling that a sentence-transformers folder states, and what of its modules is not used."""
    if not (folder / MODULES).is_file():
        return None, ()
    features: Features | None = None
    notes = []
    for module in _read_modules(folder / MODULES):
        kind, place = str(module.get("type")).rpartition(".")[2], str(module.get("path") or "")
        if kind == "Pooling":
            features, found = _pooling_of(folder, place)
            notes += found
        elif kind not in ("Transformer", "Normalize", "Dropout"):
            notes.append(
                f"{MODULES} lists a module {kind[:40]}, which a head does not use: it takes pooled hidden states"
            )
    return features, tuple(notes)


def _read_modules(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ModelError(f"{path} must hold a JSON array of modules, as sentence-transformers writes it")
    return found


def _pooling_of(folder: Path, place: str) -> tuple[Features | None, list[str]]:
    path = folder / place / CONFIG
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder / MODULES} names {place[:60]!r}, which is not in the folder")
    stated = read_json_object(path)
    mode = stated.get("pooling_mode")
    named = [mode] if isinstance(mode, str) else mode
    if not isinstance(named, list):
        named = [
            key.removeprefix(_SWITCH) for key, on in stated.items() if key.startswith(_SWITCH) and on is True
        ]
    if len(named) == 1 and str(named[0]) in POOLINGS:
        features = POOLINGS[str(named[0])]
        return features, [f"Features are pooled as {path.relative_to(folder)} states: {named[0]}"]
    stated_modes = " and ".join(str(each)[:40] for each in named) or "nothing"
    return "mean", [
        f"{path.relative_to(folder)} states pooling by {stated_modes}, which a head cannot use: it takes the mean"
    ]
