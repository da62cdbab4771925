"""How a head's features are made, told from files alone.

Threads about models pooled otherwise than their folders state: neuml/txtai#565, nixiesearch/nixiesearch#465.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ModelError
from export.model.features import choose_features

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALISE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}


def write(folder: Path, pooling: dict[str, Any] | None, *modules: dict[str, str]) -> Path:
    """A folder with a configuration, modules, and their pooling."""
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, *modules]))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "features"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_the_pooling_of_a_sentence_model_is_taken(
    tmp_path: Path, pooling: dict[str, Any], features: str
) -> None:
    """Both forms in which sentence-transformers states one pooling are read, and told in one sentence."""
    choice = choose_features(write(tmp_path, pooling, NORMALISE), ("a", "b"))
    assert (choice.features, choice.rows, choice.own, len(choice.pooled)) == (features, None, None, 1)


@pytest.mark.parametrize(
    ("pooling", "modules", "said"),
    [
        ({"pooling_mode_max_tokens": True}, (), "states pooling by max_tokens, which a head cannot use"),
        ({"pooling_mode": "weightedmean"}, (), "states pooling by weightedmean"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            (),
            "by cls_token and mean_tokens",
        ),
        ({}, (), "states pooling by nothing"),
        ({"pooling_mode": "mean"}, (DENSE,), "lists a module Dense, which a head does not use"),
    ],
)
def test_what_a_head_cannot_use_is_told_and_the_mean_taken(
    tmp_path: Path, pooling: dict[str, Any], modules: tuple[dict[str, str], ...], said: str
) -> None:
    """Other poolings, several at once and further layers each give a sentence."""
    choice = choose_features(write(tmp_path, pooling, *modules), ("a", "b"))
    assert choice.features == "mean"
    assert said in choice.pooled[-1]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("{}", "must hold a JSON array of modules"),
        ("[", "cannot read"),
        (json.dumps([POOLING]), "cannot read"),
        (json.dumps([{**POOLING, "path": "../elsewhere"}]), "which is not in the folder"),
    ],
)
def test_damaged_modules_are_refused(tmp_path: Path, modules: str, message: str) -> None:
    """What is no list of modules, lacks its pooling, or leads out of the folder is refused by name."""
    (write(tmp_path, None) / "modules.json").write_text(modules)
    with pytest.raises(ModelError, match=message):
        choose_features(tmp_path, ("a", "b"))


def test_a_language_model_has_no_head(tmp_path: Path) -> None:
    """Without labels nothing is chosen and nothing told."""
    choice = choose_features(write(tmp_path, {"pooling_mode": "cls"}), ())
    assert (choice.features, choice.rows, choice.own, choice.pooled) == (None, None, None, ())
