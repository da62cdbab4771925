"""The pass that replaces frozen matrices: it reads shapes alone, and describes what has to be written."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from export.capture.segment import SegmentGraph
from export.quantisation.quantise import frozen_embedding, frozen_linear, quantise
from export.quantisation.quantise_graph import quantise_segment, stored_name
from tests.export import tiny

aten = torch.ops.aten


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_shapes_are_enough(tiny_model, tmp_path, quantisation: str) -> None:
    """A model is captured and quantised without its values; each tensor then made has the announced shape and type."""
    chosen = tiny.options(tiny_model, tmp_path / "out", quantisation=quantisation)
    stored, _ = tiny.store_model(chosen)
    assert all(tensor.is_meta for tensor in stored.shapes.values())
    for name, announced in stored.shapes.items():
        made = stored.tensors[name]
        assert (made.shape, made.dtype) == (announced.shape, announced.dtype), name
    suffixes = {name.rpartition(".")[2] for name in stored.shapes}
    assert {"levels", "scales"} <= suffixes
    assert ("zero_points" in suffixes) == (quantisation == "int4")


def tied_segment(weight: torch.Tensor) -> SegmentGraph:
    """y = linear(embedding(index), w) with one matrix for both."""
    segment = SegmentGraph("tied", values=["index"], outputs=["hidden"], weights={"w": "model.w"})
    index, w = segment.graph.placeholder("index"), segment.graph.placeholder("w")
    w.meta["val"] = weight
    rows = segment.graph.call_function(aten.embedding.default, (w, index))
    first = segment.graph.call_function(aten.linear.default, (rows, w))
    again = segment.graph.call_function(aten.linear.default, (rows, w))
    segment.graph.output((segment.graph.call_function(aten.add.Tensor, (first, again)),))
    return segment


@pytest.mark.parametrize("quantisation", ["int8", "int4"])
def test_a_matrix_used_both_ways_is_stored_for_each_use(quantisation: str) -> None:
    """Tied embeddings: one set of parts for the rows, one for the products, however many products there are."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    segment, parts = quantise_segment(tied_segment(weight), {"model.w": weight}, quantisation)
    assert {(part.source, part.kind) for part in parts.values()} == {
        ("model.w", "linear"),
        ("model.w", "embedding"),
    }
    assert set(segment.weights.values()) == set(parts)
    targets = [node.target for node in segment.graph.nodes if node.op == "call_function"]
    assert targets == [frozen_embedding, frozen_linear, frozen_linear, aten.add.Tensor]
    tensors = {
        stored_name("model.w", kind, suffix): tensor
        for kind in ("linear", "embedding")
        for suffix, tensor in quantise(weight, kind, quantisation).items()
    }
    index = torch.tensor([[3, 1]])
    (got,) = fx.GraphModule({}, segment.graph)(index, *(tensors[n] for n in segment.weights.values()))
    exact = 2 * weight[index] @ weight.T
    assert (got - exact).norm() < (0.02 if quantisation == "int8" else 0.2) * exact.norm()


def test_unquantised_segments_are_left_alone() -> None:
    """With ``none`` the graph names the float matrix, and nothing is announced."""
    weight = torch.zeros(64, 64)
    before = str(tied_segment(weight).graph)
    segment, parts = quantise_segment(tied_segment(weight), {"model.w": weight}, "none")
    assert (str(segment.graph), parts, segment.weights) == (before, {}, {"w": "model.w"})
