from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from edge_runtime.errors import ModelError
from export.slices.sliced_linear import SliceOptions
from export.slices.sparse import MOST_ENTRIES, SparseLinear, entries_of, highest


def make(out: int, inputs: int, **chosen: object) -> SparseLinear:
    options = SliceOptions("sparse", **chosen)
    return SparseLinear("it", nn.Linear(inputs, out), options, torch.Generator().manual_seed(3))


def test_each_output_keeps_its_own_highest_scores() -> None:
    """Scores are compared within an output, so each keeps as many, whatever the scores of others are."""
    scores = torch.tensor([[0.1, 9.0, 8.0, 0.2], [0.01, 0.02, 0.001, 0.03]])
    assert highest(scores, 2).tolist() == [[1, 1], [2, 3]]
    layer = make(2, 4, density=0.5, scores={"it": scores})
    assert layer.index.T.tolist() == [[1, 2], [1, 3]]
    assert layer.index.dtype == torch.int32


def test_the_share_of_trained_entries_is_the_density() -> None:
    """A layer of 200 inputs at density 0.05 trains ten entries of each output, and one of few inputs at least one."""
    assert make(3, 200, density=0.05).values.shape == (1, 10, 3)
    assert make(3, 20, density=0.01).values.shape == (1, 1, 3)
    rows = make(7, 40, density=0.1).index.T
    assert all(len(set(row.tolist())) == 4 for row in rows)


def test_at_density_one_a_slice_is_a_whole_matrix() -> None:
    """With all entries trained, the slice adds what any matrix would."""
    layer = make(5, 6, density=1.0)
    layer.values.data = torch.randn(1, 6, 5)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x) - layer.linear(x), x @ layer.values[0], rtol=1e-4, atol=1e-5)


def test_too_many_entries_are_refused_with_a_density_that_fits() -> None:
    """A density of more than 64 entries an output is refused, and the one that the message names is taken."""
    with pytest.raises(ModelError, match=f"102 entries .* limit {MOST_ENTRIES}") as caught:
        entries_of(0.1, 1024)
    named = re.search(r"at most --density ([0-9.]+)", str(caught.value))
    assert named is not None
    assert entries_of(float(named[1]), 1024) <= MOST_ENTRIES


def test_there_is_no_way_to_an_adapter_and_from_it() -> None:
    """Sparse values are no pair of factors and start from none; each message says what to do instead."""
    with pytest.raises(ModelError, match="take edge-export merge"):
        SparseLinear.pair("it", {}, lambda _: pytest.fail("asked"))
    with pytest.raises(ModelError, match="merge it into the model first"):
        SparseLinear.start("folder", "query", ([], [], 1.0), lambda _: pytest.fail("asked"))
