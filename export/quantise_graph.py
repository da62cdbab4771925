"""Pass: frozen linear layers and embeddings of a segment become quantised operators.

Precondition: a segment as ``export.capture`` cuts it. Afterwards no eligible frozen matrix is float: each
``aten.linear`` on a frozen matrix and each ``aten.embedding`` calls its block-wise int8 counterpart, and the
weight placeholder is replaced by two, ``*_levels`` and ``*_scales``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from export.capture import Capture, SegmentGraph
from export.quantise import BLOCK, frozen_embedding, frozen_linear, quantise_rows

aten = torch.ops.aten

#: accuracy_level of MatMulNBits as shipped: products in int8 arithmetic.
INT8_ARITHMETIC = 4


def quantise_capture(
    captured: Capture, quantisation: str
) -> tuple[tuple[SegmentGraph, ...], dict[str, Tensor]]:
    """Quantise all segments of a capture.

    Args:
        captured: its segments are rewritten in place.
        quantisation: ``int8``, or ``none`` to leave everything float32.

    Returns:
        The segments, and every tensor they name, trainable ones included.
    """
    tensors = dict(captured.tensors)
    if quantisation == "int8":
        for segment in captured.segments:
            _, stored = quantise_segment(segment, captured.tensors, INT8_ARITHMETIC)
            tensors.update(stored)
    return captured.segments, tensors


def quantise_segment(
    segment: SegmentGraph, tensors: dict[str, Tensor], accuracy_level: int
) -> tuple[SegmentGraph, dict[str, Tensor]]:
    """Rewrite a segment in place.

    Args:
        segment: changed in place and returned.
        tensors: frozen tensors of the model by name.
        accuracy_level: of ``MatMulNBits``: 4 computes in int8, 1 in float32.

    Returns:
        The segment, and the tensors its weights now name (levels, scales, and whatever stayed float).
    """
    stored = {source: tensors[source] for source in segment.weights.values()}
    for node in list(segment.graph.nodes):
        weight = _frozen_matrix(node, segment)
        if weight is None or not _eligible(stored[segment.weights[weight.name]], node):
            continue
        source = segment.weights[weight.name]
        levels, scales = _replace_weight(segment, weight, stored)
        with segment.graph.inserting_before(node):
            if node.target is aten.linear.default:
                bias = node.args[2] if len(node.args) > 2 else None
                args = (node.args[0], levels, scales, bias, accuracy_level)
                new = segment.graph.call_function(frozen_linear, args)
            else:
                new = segment.graph.call_function(frozen_embedding, (levels, scales, node.args[1]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        segment.graph.erase_node(node)
        if not weight.users:
            segment.graph.erase_node(weight)
            del segment.weights[weight.name], stored[source]
    segment.graph.lint()
    return segment, stored


def _frozen_matrix(node: fx.Node, segment: SegmentGraph) -> fx.Node | None:
    if node.op != "call_function" or node.target not in (aten.linear.default, aten.embedding.default):
        return None
    weight = node.args[1] if node.target is aten.linear.default else node.args[0]
    return weight if isinstance(weight, fx.Node) and weight.name in segment.weights else None


def _eligible(weight: Tensor, node: fx.Node) -> bool:
    """Whole blocks along the input, and more than a slice's few rows."""
    rows, columns = weight.shape
    return columns % BLOCK == 0 and (rows >= BLOCK or node.target is aten.embedding.default)


def _replace_weight(
    segment: SegmentGraph, weight: fx.Node, stored: dict[str, Tensor]
) -> tuple[fx.Node, fx.Node]:
    source = segment.weights[weight.name]
    existing = {node.name: node for node in segment.graph.nodes if node.op == "placeholder"}
    names = (f"{weight.name}_levels", f"{weight.name}_scales")
    if names[0] in existing:  # one matrix used twice is stored once
        return existing[names[0]], existing[names[1]]
    made = []
    levels, scales = quantise_rows(stored[source])
    if any(user.target is aten.embedding.default for user in weight.users):
        levels = levels.flatten(1)
    for name, suffix, tensor in zip(names, ("levels", "scales"), (levels, scales), strict=True):
        with segment.graph.inserting_before(weight):
            node = segment.graph.placeholder(name)
        node.meta["val"] = tensor
        segment.weights[node.name] = f"{source}.{suffix}"
        stored[f"{source}.{suffix}"] = tensor
        made.append(node)
    # keep the documented order of inputs: weights in order of their placeholders
    order = [n.name for n in segment.graph.nodes if n.op == "placeholder" and n.name in segment.weights]
    segment.weights = {name: segment.weights[name] for name in order}
    return made[0], made[1]
