"""Pass: frozen linear layers and embeddings of a segment become quantised operators.

Precondition: a segment as ``export.capture.record`` cuts it. Afterwards no eligible frozen matrix is float: each
``aten.linear`` on a frozen matrix and each ``aten.embedding`` calls its quantised counterpart, and the weight
placeholder is replaced by ``*_levels``, ``*_scales`` and, in int4, ``*_zero_points``. The pass reads shapes only: the
tensors that the new placeholders name are described, and quantised when they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from export.capture.segment import SegmentGraph
from export.quantisation.quantise import MatrixKind, frozen_embedding, frozen_linear, stored_parts

aten = torch.ops.aten

#: accuracy_level of MatMulNBits as shipped: products in int8 arithmetic.
INT8_ARITHMETIC = 4
_KINDS: dict[object, MatrixKind] = {aten.linear.default: "linear", aten.embedding.default: "embedding"}


@dataclass(frozen=True)
class StoredPart:
    """A tensor that a segment names and that quantising a matrix makes.

    Attributes:
        source: name of the matrix in the model.
        suffix: name of the part: ``levels``, ``scales`` or ``zero_points``.
        kind: what the matrix is used as.
        shape: shape of the part.
        dtype: element type of the part.
    """

    source: str
    suffix: str
    kind: MatrixKind
    shape: tuple[int, ...]
    dtype: torch.dtype


def quantise_segment(
    segment: SegmentGraph,
    tensors: Mapping[str, Tensor],
    quantisation: str,
    accuracy_level: int = INT8_ARITHMETIC,
) -> tuple[SegmentGraph, dict[str, StoredPart]]:
    """Rewrite a segment in place.

    Args:
        segment: segment to rewrite; it is changed in place and returned.
        tensors: frozen tensors of the model by name; only their shapes are read, so they may be fake.
        quantisation: format of frozen matrices: ``int8``, ``int4``, or ``none`` to leave everything float32.
        accuracy_level: attribute of ``MatMulNBits``: 4 computes in int8, 1 in float32.

    Returns:
        The segment; and each quantised tensor that it now names, by stored name.
    """
    stored: dict[str, StoredPart] = {}
    for node in list(segment.graph.nodes):
        weight = _frozen_matrix(node, segment)
        if weight is None:
            continue
        source, kind = segment.weights[weight.name], _KINDS[node.target]
        parts = {
            stored_name(source, kind, suffix): StoredPart(source, suffix, kind, shape, dtype)
            for suffix, (shape, dtype) in stored_parts(
                kind, quantisation, tuple(tensors[source].shape)
            ).items()
        }
        if not parts:
            continue
        stored.update(parts)
        placeholders = _part_placeholders(segment, weight, parts)
        levels, scales, zero_points = (*placeholders, None)[:3]
        with segment.graph.inserting_before(node):
            if kind == "linear":
                bias = node.args[2] if len(node.args) > 2 else None
                arguments = (node.args[0], levels, scales, zero_points, bias, accuracy_level)
                new = segment.graph.call_function(frozen_linear, arguments)
            else:
                new = segment.graph.call_function(frozen_embedding, (levels, scales, node.args[1]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        segment.graph.erase_node(node)
        if not weight.users:
            segment.graph.erase_node(weight)
            del segment.weights[weight.name]
    segment.graph.lint()
    return segment, stored


def stored_name(source: str, kind: MatrixKind, suffix: str) -> str:
    """Name of a stored part. A matrix used both ways has a name for each use; in int8 their bytes are equal."""
    return f"{source}.rows.{suffix}" if kind == "embedding" else f"{source}.{suffix}"


def _frozen_matrix(node: fx.Node, segment: SegmentGraph) -> fx.Node | None:
    if node.op != "call_function" or node.target not in _KINDS:
        return None
    weight = node.args[1] if node.target is aten.linear.default else node.args[0]
    return weight if isinstance(weight, fx.Node) and weight.name in segment.weights else None


def _part_placeholders(
    segment: SegmentGraph, weight: fx.Node, parts: Mapping[str, StoredPart]
) -> list[fx.Node]:
    """Placeholders of a matrix's parts, made once however many nodes use it."""
    existing = {node.name: node for node in segment.graph.nodes if node.op == "placeholder"}
    found = {source: existing[name] for name, source in segment.weights.items() if source in parts}
    if not found:
        for stored, part in parts.items():
            stem = f"{weight.name}_rows" if part.kind == "embedding" else weight.name
            with segment.graph.inserting_before(weight):
                node = segment.graph.placeholder(f"{stem}_{part.suffix}")
            node.meta["val"] = weight.meta["val"].new_empty(part.shape, dtype=part.dtype)
            segment.weights[node.name] = stored
            found[stored] = node
        # keep the documented order of inputs: weights in order of their placeholders
        order = [n.name for n in segment.graph.nodes if n.op == "placeholder" and n.name in segment.weights]
        segment.weights = {name: segment.weights[name] for name in order}
    return [found[stored] for stored in parts]
