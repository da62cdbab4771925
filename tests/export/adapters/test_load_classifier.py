"""The one file that loads a fresh head; that it works where this project is absent is in tests/field/test_heads.py."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from export.adapters import load_classifier
from export.model.heads import Head

SOURCE = Path(load_classifier.__file__).read_text("utf-8")


def test_it_is_short_and_needs_what_its_reader_has() -> None:
    """It has fewer than 100 lines and imports the standard library, torch, transformers, safetensors and peft alone."""
    assert len(SOURCE.splitlines()) < 100
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert names - sys.stdlib_module_names == {"torch", "transformers", "safetensors", "peft"}


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_pools_as_the_package_does(pooling: str, side: str) -> None:
    """Each pooling gives the logits of the package's head, on whichever side texts are padded."""
    torch.manual_seed(3)
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    head = Head(8, 3, pooling)
    head.weight.data.normal_()
    head.bias.data.normal_()
    expected = head(hidden, mask, torch.zeros(2, dtype=torch.int64))[1]
    if side == "left":
        hidden[1], mask[1] = hidden[1].roll(2, 0), mask[1].roll(2, 0)
    model = torch.nn.Module()
    model.forward = lambda **_: SimpleNamespace(last_hidden_state=hidden)  # type: ignore[method-assign]
    values = {"weight": head.weight.detach(), "bias": head.bias.detach()}
    got = load_classifier.Classifier(model, values, {"pooling": pooling})(torch.zeros_like(mask), mask)
    torch.testing.assert_close(got, expected)
