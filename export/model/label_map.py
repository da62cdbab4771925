"""The label maps of a model folder's configuration, compared with each other and with the labels of a package.

``config.json`` states twice which label a class has: ``id2label`` by index and ``label2id`` by label.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelError

#: What transformers calls a class that was never given a name.
_UNNAMED = re.compile(r"LABEL_(\d+)")


def read_id2label(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Labels by class index; empty where the configuration has no map.

    Args:
        config: content of the configuration.
        path: path of the configuration, for messages.

    Raises:
        ModelError: the map has gaps, names a label twice, or ``label2id`` says something else.
    """
    named = config.get("id2label")
    if named is None:
        return ()
    if not isinstance(named, dict) or set(named) != {str(index) for index in range(len(named))}:
        raise ModelError(f"id2label of {path} must be an object from the class indices 0, 1, … to labels")
    labels = tuple(str(named[str(index)]) for index in range(len(named)))
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ModelError(
            f"id2label of {path} gives {twice[:60]!r} to two classes; give each a label of its own"
        )
    _compare(labels, config.get("label2id"), path)
    return labels


def is_unnamed(labels: tuple[str, ...]) -> bool:
    """Whether labels are the names LABEL_0, LABEL_1, … that transformers makes up, in their order."""
    return labels == tuple(f"LABEL_{index}" for index in range(len(labels)))


def _compare(labels: tuple[str, ...], indices: object, path: Path) -> None:
    """``label2id`` must say what ``id2label`` does; one of made-up names alone says nothing."""
    if indices is None or labels == ():
        return
    if not isinstance(indices, dict):
        raise ModelError(f"label2id of {path} must be an object from label to class index")
    if all(_UNNAMED.fullmatch(str(label)) for label in indices):
        return
    for index, label in enumerate(labels):
        if str(indices.get(label)) != str(index):
            said = "does not name it" if label not in indices else f"says {str(indices[label])[:20]}"
            raise ModelError(
                f"{path} contradicts itself: id2label gives class {index} the label {label[:60]!r}, label2id {said}; "
                "correct one of the two, or remove label2id"
            )
