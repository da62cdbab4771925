"""The two label maps of a configuration must say one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ModelError
from export.model.label_map import is_unnamed, read_id2label

PATH = Path("folder/config.json")
NAMED = {"0": "no", "1": "yes"}


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, ()),
        ({"id2label": NAMED}, ("no", "yes")),
        ({"id2label": {"1": "yes", "0": "no"}, "label2id": {"yes": 1, "no": 0}}, ("no", "yes")),
        ({"id2label": NAMED, "label2id": {"yes": "1", "no": "0"}}, ("no", "yes")),
        ({"id2label": NAMED, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ("no", "yes")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_come_in_the_order_of_their_classes(config: dict[str, Any], labels: tuple[str, ...]) -> None:
    """A map gives the labels by index; indices may be text, and a label2id of made-up names alone says nothing."""
    assert read_id2label(config, PATH) == labels


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": ["no", "yes"]}, "must be an object from the class indices"),
        ({"id2label": {"0": "no", "2": "yes"}}, "must be an object from the class indices"),
        ({"id2label": {"0": "no", "1": "no"}}, "gives 'no' to two classes"),
        ({"id2label": NAMED, "label2id": ["no", "yes"]}, "label2id of folder/config.json must be an object"),
        (
            {"id2label": NAMED, "label2id": {"yes": 0, "no": 1}},
            "id2label gives class 0 the label 'no', label2id says 1",
        ),
        (
            {"id2label": NAMED, "label2id": {"no": 0}},
            "class 1 the label 'yes', label2id does not name it; correct one",
        ),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(config: dict[str, Any], message: str) -> None:
    """Gaps, a label of two classes, and a label2id that says something else are refused with what contradicts what."""
    with pytest.raises(ModelError) as caught:
        read_id2label(config, PATH)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_made_up_names_are_known() -> None:
    """LABEL_0, LABEL_1, … in their order are no names; in another order they are taken as names."""
    assert is_unnamed(("LABEL_0", "LABEL_1", "LABEL_2"))
    assert not is_unnamed(("LABEL_1", "LABEL_0"))
