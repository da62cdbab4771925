from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_runtime.errors import ModelError
from export.slices.rows import RowsLinear
from export.slices.sliced_linear import SliceOptions


def make(out: int, inputs: int, rank: int) -> RowsLinear:
    options = SliceOptions("rows", rank=rank)
    return RowsLinear("it", nn.Linear(inputs, out), options, torch.Generator().manual_seed(3))


def test_each_of_the_rows_stands_for_another_one_of_the_weight() -> None:
    """A fresh slice has as many rows as were asked for, each in a place of its own, and changes nothing."""
    layer = make(6, 4, 3)
    assert (layer.place[0].sum(0).tolist(), layer.place[0].sum(1).max().item()) == ([1, 1, 1], 1)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x), layer.linear(x))


def test_more_rows_than_the_layer_has_are_refused() -> None:
    """As many rows as outputs are taken, one more is not, and the message names the limit."""
    assert make(6, 4, 6).rows.shape == (1, 6, 4)
    with pytest.raises(ModelError, match="--rank 7 asks for more rows than the 6"):
        make(6, 4, 7)


def test_there_is_no_way_to_an_adapter_and_from_it() -> None:
    """Rows are no pair of factors and start from none; each message says what to do instead."""
    with pytest.raises(ModelError, match="take edge-export merge"):
        RowsLinear.pair("it", {}, lambda _: pytest.fail("asked"))
    with pytest.raises(ModelError, match="merge it into the model first"):
        RowsLinear.start("folder", "query", ([], [], 1.0), lambda _: pytest.fail("asked"))
