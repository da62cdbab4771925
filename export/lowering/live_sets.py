"""Predict a program's largest live set, as polynomials in batch, sequence and draws.

A buffer lives from the operator that fills it to its last use. Walking the lowered graph in its execution
order gives, at each operator, a sum of buffer sizes; sizes are monomials in the dynamic dimensions, so each
such sum is a polynomial. Which one is largest depends on the sizes, so every polynomial that no other
dominates is kept, and the prediction is their maximum.

What shares memory follows ONNX Runtime's CPU kernels as measured (docs/decisions/0011-live-sets.md): some
operators only rename axes, some overwrite an input that dies, some need working memory of their own.
Inputs belong to the caller; what depends on weights alone is folded when the program is loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from edge_runtime.package.manifest import PeakTensor, SizeTerm
from export.lowering.trace import BATCH, BEFORE, DRAWS, SEEN, SEQUENCE

#: Operators whose output is their input's memory under another shape.
ALIASES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"})
#: Operators that overwrite their first input where it has no later use. Sums, products and most functions
#: of one element do not: the engine gives them a buffer of their own.
IN_PLACE = frozenset({"Softmax", "LogSoftmax", "Tanh", "Sigmoid", "Relu", "Clip", "Cast", "ScatterElements"})
#: Working memory of a quantised product, in bytes for each element of its left operand: the operand in
#: int8, and for every 32 of them a scale and a sum.
QUANTISED_ROW_BYTES = 1.25
#: A selection computes both of its sides before it joins them.
SELECTION_COPIES = 2

#: Sides of decode programs, which have no draws: the power of draws is that of the tokens seen so far.
TOKENS_SEEN = frozenset({BEFORE, SEEN})

Powers = tuple[int, int, int]
Polynomial = dict[Powers, float]


@dataclass(eq=False)
class Buffer:
    """Memory that one or several values of a graph share.

    Attributes:
        size: number of bytes, a polynomial in batch, sequence and draws.
        users: indices of the nodes that read it.
        escapes: whether it is an output of the graph.
    """

    size: Polynomial
    users: set[int] = field(default_factory=set)
    escapes: bool = False


@dataclass(frozen=True)
class NodeMemory:
    """What one node does to memory.

    Attributes:
        reads: buffers that it reads.
        makes: buffers that it fills.
        overwrites: buffer that it may write its result into, if nothing else reads that buffer later; None for most.
        workspace: bytes that it needs only while it runs.
    """

    reads: tuple[Buffer, ...]
    makes: tuple[Buffer, ...]
    overwrites: Buffer | None
    workspace: Polynomial


def node_memory(model: ir.Model) -> list[NodeMemory]:
    """What each node reads, makes and overwrites, in the order of the graph.

    Raises:
        ValueError: a value has no shape.
    """
    buffers: dict[ir.Value, Buffer] = {}
    constant: set[ir.Value] = set(model.graph.initializers.values())
    memory = []
    for index, node in enumerate(model.graph):
        inputs = [value for value in node.inputs if value is not None]
        if all(value in constant for value in inputs):
            constant.update(node.outputs)
            memory.append(NodeMemory((), (), None, {}))
            continue
        reads = tuple(dict.fromkeys(buffers[value] for value in inputs if value in buffers))
        for buffer in reads:
            buffer.users.add(index)
        if node.op_type in ALIASES:
            if inputs[0] in buffers:
                buffers[node.outputs[0]] = buffers[inputs[0]]
            memory.append(NodeMemory(reads, (), None, {}))
            continue
        made = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        for value in made:
            buffers[value] = Buffer(_size(value))
        overwritten = buffers.get(inputs[0]) if node.op_type in IN_PLACE else None
        if overwritten is not None and overwritten.size != _size(node.outputs[0]):
            overwritten = None
        makes = tuple(buffers[value] for value in made)
        memory.append(NodeMemory(reads, makes, overwritten, _workspace(node)))
    for value in model.graph.outputs:
        if value in buffers:
            buffers[value].escapes = True
    return memory


def live_sets(model: ir.Model) -> tuple[tuple[SizeTerm, ...], ...]:
    """Polynomials whose largest value at a size is the program's peak of live tensors, in bytes."""
    memory = node_memory(model)
    alive: dict[Buffer, None] = {}
    sums: list[Polynomial] = []
    for position, node in enumerate(memory):
        last = [b for b in node.reads if b in alive and not b.escapes and max(b.users) == position]
        if node.overwrites in last:
            alive.pop(node.overwrites)
        alive.update(dict.fromkeys(node.makes))
        sums.append(_sum([*(buffer.size for buffer in alive), node.workspace]))
        for buffer in last:
            alive.pop(buffer, None)
    return tuple(_terms(polynomial) for polynomial in _undominated(sums))


def peak_tensors(model: ir.Model, reference: tuple[int, int, int], count: int) -> tuple[PeakTensor, ...]:
    """The largest tensors alive where the live set is largest.

    Args:
        model: lowered program, its nodes in their final order.
        reference: batch, sequence and draws at which sizes are compared.
        count: largest number of tensors to give.

    Returns:
        The tensors, largest first. Those that share memory are given once, under the name of the one that made it.
    """
    memory = node_memory(model)
    made: dict[Buffer, tuple[ir.Node, ir.Value]] = {}
    alive: dict[Buffer, None] = {}
    peak, peak_bytes = list[Buffer](), 0.0
    for position, (node, use) in enumerate(zip(model.graph, memory, strict=True)):
        last = [b for b in use.reads if b in alive and not b.escapes and max(b.users) == position]
        if use.overwrites in last:
            alive.pop(use.overwrites)
        outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        made.update(zip(use.makes, ((node, value) for value in outputs), strict=False))
        alive.update(dict.fromkeys(use.makes))
        total = sum(evaluate(buffer.size, *reference) for buffer in alive)
        if total > peak_bytes:
            peak, peak_bytes = list(alive), total
        for buffer in last:
            alive.pop(buffer, None)
    peak.sort(key=lambda buffer: -evaluate(buffer.size, *reference))
    return tuple(_described(buffer, *made[buffer]) for buffer in peak[:count])


def _described(buffer: Buffer, node: ir.Node, value: ir.Value) -> PeakTensor:
    sides = tuple(str(getattr(side, "value", side)) for side in value.shape or ())
    ((powers, coefficient),) = buffer.size.items()
    return PeakTensor(str(value.name), node.op_type, sides, SizeTerm(coefficient, *powers))


def evaluate(size: Polynomial, batch: int, sequence: int, draws: int) -> float:
    """Bytes of a polynomial at a size."""
    return float(
        sum(
            coefficient * batch ** powers[0] * sequence ** powers[1] * draws ** powers[2]
            for powers, coefficient in size.items()
        )
    )


def _workspace(node: ir.Node) -> Polynomial:
    if node.op_type == "MatMulNBits" and node.inputs[0] is not None:
        rows = node.inputs[0]
        per_byte = QUANTISED_ROW_BYTES / (rows.dtype.itemsize if rows.dtype else 1)
        return {powers: coefficient * per_byte for powers, coefficient in _size(rows).items()}
    if node.op_type == "Where":
        result = _size(node.outputs[0])
        return {powers: SELECTION_COPIES * coefficient for powers, coefficient in result.items()}
    return {}


def _size(value: ir.Value) -> Polynomial:
    if value.shape is None or value.dtype is None:
        raise ValueError(f"value {value.name} of the lowered program has no shape")
    coefficient, powers = float(value.dtype.itemsize), {BATCH: 0, SEQUENCE: 0, DRAWS: 0}
    named = True
    for side in value.shape:
        # A flattened axis is called by its factors, as "batch*sequence".
        for factor in [side] if isinstance(side, int) else str(side.value).split("*"):
            if isinstance(factor, int) or factor.isdecimal():
                coefficient *= int(factor)
            elif factor in powers or factor in TOKENS_SEEN:
                powers[DRAWS if factor in TOKENS_SEEN else factor] += 1
            else:
                named = False
    if not named:
        # Axes that the translation left unnamed occur in position indices: at most one entry a token.
        powers = {BATCH: 1, SEQUENCE: 1, DRAWS: 0}
    return {(powers[BATCH], powers[SEQUENCE], powers[DRAWS]): coefficient}


def _sum(polynomials: Iterable[Polynomial]) -> Polynomial:
    total: defaultdict[Powers, float] = defaultdict(float)
    for polynomial in polynomials:
        for powers, coefficient in polynomial.items():
            total[powers] += coefficient
    return dict(total)


def _undominated(polynomials: list[Polynomial]) -> list[Polynomial]:
    """Those that may be the largest at some size: no other is at least as large in every term."""
    kept: list[Polynomial] = []
    for polynomial in polynomials:
        if any(_dominates(other, polynomial) for other in kept):
            continue
        kept = [other for other in kept if not _dominates(polynomial, other)]
        kept.append(polynomial)
    return kept


def _dominates(larger: Polynomial, smaller: Polynomial) -> bool:
    return all(larger.get(powers, 0.0) >= coefficient for powers, coefficient in smaller.items())


def _terms(polynomial: Polynomial) -> tuple[SizeTerm, ...]:
    return tuple(SizeTerm(coefficient, *powers) for powers, coefficient in sorted(polynomial.items()))
