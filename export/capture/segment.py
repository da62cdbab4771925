"""A segment's graph, and what makes two of them equal in structure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx


@dataclass
class SegmentGraph:
    """One segment: a graph whose every input is explicit.

    Attributes:
        name: ``embedding``, ``block_N`` or ``head``.
        graph: placeholders are, in order, ``values``, then ``slices``, then ``weights``.
        values: names of flowing values taken as input.
        outputs: names of flowing values given.
        slices: placeholder name to trainable parameter name of the model.
        weights: placeholder name to frozen parameter or buffer name of the model.
    """

    name: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    slices: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)

    def copied(self) -> SegmentGraph:
        """The same segment with a graph of its own; nodes keep their names."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return SegmentGraph(
            self.name, graph, list(self.values), list(self.outputs), dict(self.slices), dict(self.weights)
        )

    def module(self) -> fx.GraphModule:
        """The graph as a callable module; it owns no tensors."""
        return fx.GraphModule(torch.nn.Module(), self.graph)


def structure_of(segment: SegmentGraph, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """A key that is equal for segments that can share a program: same operators, arguments and shapes."""
    index = {node: i for i, node in enumerate(segment.graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", index[value])
        if isinstance(value, list | tuple):
            return tuple(plain(item) for item in value)
        return str(value)

    nodes = []
    for node in segment.graph.nodes:
        if node.op == "placeholder":
            source = segment.weights.get(node.name) or segment.slices.get(node.name)
            detail: Any = (
                (node.name, tuple(tensors[source].shape), str(tensors[source].dtype)) if source else node.name
            )
        else:
            detail = (
                str(node.target),
                plain(node.args),
                tuple((k, plain(v)) for k, v in node.kwargs.items()),
            )
        nodes.append((node.op, detail))
    return (tuple(segment.values), tuple(segment.outputs), tuple(nodes))
