from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_runtime.data.rows import NO_LABEL, Row
from edge_runtime.errors import ModelError
from export.packaging import mask_scores
from export.packaging.mask_scores import Scoring, score
from tests.export import tiny

QUERIES = tuple(f"encoder.layer.{block}.attention.self.query" for block in range(2))


def scoring(model, *, labelled: bool = True) -> Scoring:
    rows = tuple(
        Row(text, number % len(tiny.LABELS) if labelled else NO_LABEL)
        for number, text in enumerate(tiny.SENTENCES)
    )
    return Scoring(model, "classification", len(tiny.LABELS), rows, 32, ("query",), seed=1)


def test_entries_that_move_have_the_higher_scores(tiny_model, monkeypatch) -> None:
    """A short dense training scores each target's entries by how far they moved, the same at the same seed."""
    monkeypatch.setattr(mask_scores, "STEPS", 4)
    found = score(scoring(tiny_model), "movement", lambda _: None)
    assert tuple(found) == QUERIES
    again = score(scoring(tiny_model), "movement", lambda _: None)
    for name, scores in found.items():
        assert scores.shape == (tiny.HIDDEN, tiny.HIDDEN)
        assert 0 < float(scores.max()) <= 4 * 10 * mask_scores.RATE
        torch.testing.assert_close(again[name], scores)


def test_scores_need_labels_or_no_rule(tiny_model) -> None:
    """Rows without labels cannot score a classifier's entries, and the message names the rule that needs none."""
    with pytest.raises(ModelError, match="8 of its rows have none; label them, or take --mask random"):
        score(scoring(tiny_model, labelled=False), "fisher", lambda _: None)


class _Linear(nn.Module):
    """A model whose loss hangs on the weight's first entry alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"it": nn.ModuleDict({"linear": nn.Linear(2, 2)})})

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor]:
        del mask, labels
        weight = self.encoder["it"]["linear"].weight
        return (weight[0, 0] * ids.sum(1).float(),)


def test_forward_mode_finds_the_entry_on_which_the_loss_hangs() -> None:
    """The mean of (jvp·v)² is three times as large where the gradient is as elsewhere, as normal directions have it."""
    model = _Linear().requires_grad_(False)

    class Rows:
        ids = ((1, 1),) * 8

        def batch(self, rows: list[int]) -> object:
            one = np.ones((len(rows), 2), np.int64)
            return msgspec.defstruct("Batch", ["input_ids", "attention_mask", "labels"])(one, one, one[:, 0])

    weight = model.encoder["it"]["linear"].weight
    found = mask_scores._fisher(model, Rows(), {"it": weight}, 0)["it"]
    others = [float(found[0, 1]), float(found[1, 0]), float(found[1, 1])]
    assert float(found[0, 0]) > 1.5 * max(others)
