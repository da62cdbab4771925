"""Predict a program's largest live set, as polynomials in batch, sequence and draws.

A tensor lives from the operator that makes it to its last use. Walking the lowered graph in its execution
order gives, at each operator, a sum of tensor sizes; sizes are monomials in the dynamic dimensions, so each
such sum is a polynomial. Which one is largest depends on the sizes, so every polynomial that no other
dominates is kept, and the prediction is their maximum.

Inputs belong to the caller. Operators that only rename axes share their input's memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import onnx_ir as ir

from edge_runtime.package import SizeTerm
from export.program import BATCH, DRAWS, SEQUENCE

#: Operators whose output the engine places in their input's memory.
ALIASES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"})

Powers = tuple[int, int, int]
Polynomial = dict[Powers, float]


def live_sets(model: ir.Model) -> tuple[tuple[SizeTerm, ...], ...]:
    """Polynomials of which the largest value at a size is the program's peak of live tensors, in bytes."""
    nodes = list(model.graph)
    last_use: dict[ir.Value, int] = {}
    owner: dict[ir.Value, ir.Value] = {}
    for position, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None:
                last_use[owner.get(value, value)] = position
        if node.op_type in ALIASES and node.inputs[0] is not None:
            owner[node.outputs[0]] = owner.get(node.inputs[0], node.inputs[0])
    for value in model.graph.outputs:
        last_use[owner.get(value, value)] = len(nodes)

    alive: dict[ir.Value, Polynomial] = {}
    candidates: list[Polynomial] = []
    for position, node in enumerate(nodes):
        for value in node.outputs:
            if value not in owner and value in last_use:
                alive[value] = _size(value)
        candidates.append(_sum(alive.values()))
        alive = {value: size for value, size in alive.items() if last_use[value] > position}
    return tuple(_terms(polynomial) for polynomial in _undominated(candidates))


def _size(value: ir.Value) -> Polynomial:
    if value.shape is None or value.dtype is None:
        raise ValueError(f"value {value.name} of the lowered program has no shape")
    coefficient, powers = float(value.dtype.itemsize), {BATCH: 0, SEQUENCE: 0, DRAWS: 0}
    for side in value.shape:
        if isinstance(side, int):
            coefficient *= side
        elif str(side.value) in powers:
            powers[str(side.value)] += 1
    if any(not isinstance(side, int) and str(side.value) not in powers for side in value.shape):
        # Axes that the translation left unnamed occur in position indices: at most one entry a token.
        powers = {BATCH: 1, SEQUENCE: 1, DRAWS: 0}
    return {(powers[BATCH], powers[SEQUENCE], powers[DRAWS]): coefficient}


def _sum(polynomials: Iterable[Polynomial]) -> Polynomial:
    total: defaultdict[Powers, float] = defaultdict(float)
    for polynomial in polynomials:
        for powers, coefficient in polynomial.items():
            total[powers] += coefficient
    return dict(total)


def _undominated(candidates: list[Polynomial]) -> list[Polynomial]:
    kept: list[Polynomial] = []
    for candidate in candidates:
        if any(_dominates(other, candidate) for other in kept):
            continue
        kept = [other for other in kept if not _dominates(candidate, other)]
        kept.append(candidate)
    return kept


def _dominates(larger: Polynomial, smaller: Polynomial) -> bool:
    return all(larger.get(powers, 0.0) >= coefficient for powers, coefficient in smaller.items())


def _terms(polynomial: Polynomial) -> tuple[SizeTerm, ...]:
    return tuple(SizeTerm(coefficient, *powers) for powers, coefficient in sorted(polynomial.items()))
