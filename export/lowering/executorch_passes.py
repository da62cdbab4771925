"""Passes that rewrite a recorded program for ExecuTorch, which has no operators for block-wise levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import FLOAT_SUFFIX, LEVELS_SUFFIX, SCALES_SUFFIX, ZERO_POINTS_SUFFIX
from export.quantisation.quantise import BLOCK, ZERO_POINT, frozen_embedding, frozen_linear

aten = torch.ops.aten
Side = int | fx.Node
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def feed_float_weights(graph: fx.Graph) -> dict[str, tuple[int, int]]:
    """Pass: each frozen product reads a float32 input (K, N); each frozen embedding dequantises the rows it gathers.

    Returns:
        The new inputs by name, with their shapes. Levels and scales that nothing reads any more are gone.

    Raises:
        ModelError: a product's levels are no input of the program.
    """
    made: dict[str, fx.Node] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is frozen_linear:
                levels, zero_points, bias = node.args[1], node.args[3], node.args[4]
                if levels.op != "placeholder" or not levels.name.endswith(LEVELS_SUFFIX):
                    raise ModelError(f"the weight of frozen product {node.name} is no input of the program")
                name = levels.name.removesuffix(LEVELS_SUFFIX) + FLOAT_SUFFIX
                outputs, blocks, block_bytes = map(int, levels.meta["val"].shape)
                if name not in made:
                    shapes[name] = (blocks * block_bytes * (1 if zero_points is None else 2), outputs)
                    with graph.inserting_before(levels):
                        made[name] = graph.placeholder(name)
                    made[name].meta["val"] = levels.meta["val"].new_empty(shapes[name], dtype=torch.float32)
                new = _call(graph, aten.matmul.default, node.args[0], made[name])
                if bias is not None:
                    new = _call(graph, aten.add.Tensor, new, bias)
            elif node.target is frozen_embedding:
                new = _dequantised_rows(graph, *node.args)
            else:
                continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        if node.name.endswith((LEVELS_SUFFIX, SCALES_SUFFIX, ZERO_POINTS_SUFFIX)):
            graph.erase_node(node)
    return shapes


def equal_ranks(graph: fx.Graph) -> None:
    """Pass: operands of elementwise operators get leading sides of one until their ranks are equal.

    ExecuTorch 1.4 plans the output of some with the first operand's rank.
    """
    for node in list(graph.nodes):
        if node.target not in _ELEMENTWISE or not all(isinstance(each, fx.Node) for each in node.args[:2]):
            continue
        ranks = [each.meta["val"].dim() for each in node.args[:2]]
        for position, rank in enumerate(ranks):
            operand = node.args[position]
            with graph.inserting_before(node):
                for _ in range(max(ranks) - rank):
                    operand = _call(graph, aten.unsqueeze.default, operand, 0)
            node.update_arg(position, operand)


def _dequantised_rows(graph: fx.Graph, levels: fx.Node, scales: fx.Node, index: fx.Node) -> fx.Node:
    """Rows of a table as float32: gathered first, so that the table itself is only read where it is needed."""
    sides = _sides(graph, index)
    rows = _call(graph, aten.index.Tensor, levels, [index])
    rows = _call(graph, aten._to_copy.default, rows, dtype=torch.float32)
    rows = _call(graph, aten.view.default, rows, [*sides, -1, BLOCK])
    factors = _call(graph, aten.index.Tensor, scales, [index])
    factors = _call(graph, aten.unsqueeze.default, factors, -1)
    centred = _call(graph, aten.sub.Tensor, rows, ZERO_POINT)
    scaled = _call(graph, aten.mul.Tensor, centred, factors)
    return _call(graph, aten.view.default, scaled, [*sides, levels.meta["val"].shape[1]])


def _sides(graph: fx.Graph, node: fx.Node) -> list[Side]:
    """The node's sizes: numbers, or nodes that read them when the program runs."""
    return [
        _call(graph, aten.sym_size.int, node, axis) if isinstance(side, torch.SymInt) else int(side)
        for axis, side in enumerate(node.meta["val"].shape)
    ]


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node; its ``val`` is computed at once, since later passes read shapes."""
    node = graph.call_function(target, args, kwargs)
    real = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
    node.meta["val"] = target(*real[0], **real[1])
    return node
