"""Slice values that compute what an adapter computes, so that a run can go on from an adapter.

A LoRA slice takes A and B as they are. A LoRA-XS slice has only its core R between frozen factors U (out, r) and
V (r, in). There is an R with U·R·V = scale·B·A if the pair lies in their span, as that of an earlier LoRA-XS run on the
same model does. Then R = U⁺·(scale·B·A)·V⁺, by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, key
from export.adapters.read import Adapter, Pair

#: Largest part of an update, by Frobenius norm, that may lie outside a LoRA-XS slice's span.
SPAN_TOLERANCE = 1e-3
#: Gives a LoRA-XS slice's frozen factors up (out, r) and down (r, in).
Factors = Callable[[SliceSpec], tuple[FloatArray, FloatArray]]


def start_values(adapter: Adapter, specs: Iterable[SliceSpec], factors: Factors) -> Values:
    """Values of all slices that an adapter speaks for.

    Args:
        adapter: adapter to start from.
        specs: slices of the package.
        factors: function that gives the frozen factors of a slice; called for LoRA-XS slices only.

    Returns:
        Values by flat name; the head's are among them if the adapter has a head.

    Raises:
        ModelError: the adapter has no factors for a slice, or factors for none; shapes differ; or the update lies
            outside a slice's span.
    """
    values: Values = {}
    used = set()
    for spec in specs:
        if spec.kind == "head":
            values |= {key(spec.name, name): part for name, part in (adapter.head or {}).items()}
        else:
            if spec.target not in adapter.pairs:
                raise ModelError(f"{adapter.folder} has no factors for slice {spec.name} of the package")
            used.add(spec.target)
            values |= _slice_values(adapter, spec, factors)
        _check_shapes(adapter, spec, values)
    if unused := sorted(set(adapter.pairs) - used):
        raise ModelError(
            f"{adapter.folder} adapts {unused[0]}, which is no linear layer of the model's blocks; "
            "is it for another model?"
        )
    return values


def _slice_values(adapter: Adapter, spec: SliceSpec, factors: Factors) -> Values:
    pair = adapter.pairs[spec.target]
    if spec.kind == "lora":
        return {key(spec.name, "A"): pair.a[None], key(spec.name, "B"): pair.b[None]}
    up, down = factors(spec)
    if (pair.b.shape[0], pair.a.shape[1]) != (up.shape[0], down.shape[1]):
        raise ModelError(
            f"{adapter.folder} has A {pair.a.shape} and B {pair.b.shape} for {spec.target}, whose weight is "
            f"({up.shape[0]}, {down.shape[1]}); is it for another model?"
        )
    core, outside = fit_core(pair, adapter.scale, up, down)
    if outside > SPAN_TOLERANCE:
        raise ModelError(
            f"{outside:.2g} of {adapter.folder}'s update of {spec.target} lies outside the span of its LoRA-XS slice, "
            f"limit {SPAN_TOLERANCE:g}; start from it with --slice lora"
        )
    return {key(spec.name, "core"): core[None]}


def fit_core(pair: Pair, scale: float, up: FloatArray, down: FloatArray) -> tuple[FloatArray, float]:
    """The core (r, r) nearest to scale·B·A, and the part of the update that it misses, by Frobenius norm (0 to 1).

    Nothing of the size of the layer's weight is formed.
    """
    a, b = pair.a.astype(np.float64), scale * pair.b.astype(np.float64)
    left, right = up.astype(np.float64), down.astype(np.float64)
    core = (np.linalg.pinv(left) @ b) @ (a @ np.linalg.pinv(right))
    missed = _norm(np.hstack([b, -left @ core]), np.vstack([a, right]))
    whole = _norm(b, a)
    return core.astype(np.float32), missed / whole if whole else 0.0


def _norm(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Frobenius norm of left·right, from the triangular factors of both."""
    return float(np.linalg.norm(np.linalg.qr(left).R @ np.linalg.qr(right.T).R.T))


def _check_shapes(adapter: Adapter, spec: SliceSpec, values: Values) -> None:
    for tensor in spec.tensors:
        value = values.get(key(spec.name, tensor.name))
        if value is not None and value.shape != tensor.shape:
            raise ModelError(
                f"{adapter.folder} has {tensor.name} {value.shape} for {spec.name}, the model needs {tensor.shape}; "
                "is it for another model?"
            )
