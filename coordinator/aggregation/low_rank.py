"""LoRA's factors averaged by their product: ``lora_aggregation = "product_svd"``.

A LoRA slice adds B A, with A (r, in) and B (out, r). The mean of the factors is not the factors of the mean: mean(B)
mean(A) differs from mean(B A) by the covariance of the devices' factors. Here the product of each device's factors
after its task enters the mean, and the leading r singular triplets of the mean become the new factors: the closest
matrix of that rank (Eckart & Young 1936).

Memory is one float64 matrix (out, in) for each LoRA slice, whatever the number of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.server_optimizers import DoubleArray
from edge_runtime.errors import PackageError
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, key
from edge_runtime.slices.kinds import KINDS

#: Name of the tensor that stands in a contribution's delta for A and B of a slice.
PRODUCT = "product"
#: Singular values below this share of the largest are noise of the arithmetic.
NOISE = 1e-10


def with_products(
    contributions: Iterable[Contribution], values: Values, specs: Sequence[SliceSpec]
) -> Iterable[Contribution]:
    """Each contribution with the delta of the product, (B + dB)(A + dA) - B A, in place of the deltas of A and B.

    Args:
        contributions: contributions of a round; consumed one at a time.
        values: slice values that the round's tasks came with.
        specs: all slices of the package.
    """
    pairs = [(_names(spec), key(spec.name, PRODUCT)) for spec in specs if _has_pair(spec)]
    for contribution in contributions:
        delta = dict(contribution.delta)
        for (a, b), product in pairs:
            if a in delta:
                before_a, before_b = _double(values[a]), _double(values[b])
                after_a, after_b = before_a + _double(delta.pop(a)), before_b + _double(delta.pop(b))
                delta[product] = after_b @ after_a - before_b @ before_a
        yield replace(contribution, delta=delta)


def factor_deltas(
    deltas: Mapping[str, DoubleArray], values: Values, specs: Sequence[SliceSpec]
) -> dict[str, DoubleArray]:
    """Mean deltas with those of A and B (new factors minus current ones) in place of the delta of their product.

    Args:
        deltas: mean deltas of contributions that went through :func:`with_products`.
        values: slice values that the round's tasks came with.
        specs: all slices of the package.
    """
    result = dict(deltas)
    for spec in filter(_has_pair, specs):
        product = key(spec.name, PRODUCT)
        if product in result:
            a, b = (values[name] for name in _names(spec))
            before_a, before_b = _double(a), _double(b)
            new_a, new_b = factorise(before_b @ before_a + result.pop(product), before_a, before_b)
            name_a, name_b = _names(spec)
            result[name_a] = (new_a - before_a).reshape(a.shape)
            result[name_b] = (new_b - before_b).reshape(b.shape)
    return result


def factorise(product: DoubleArray, a: DoubleArray, b: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
    """Factors of the closest product of rank r that lie as close as can be to the current ones.

    Singular values are split evenly: B = U S^1/2, A = S^1/2 V^T. Any rotation Q of r directions gives the same product,
    (B Q)(Q^T A); the one that minimises the distance to the current factors is the polar factor of B^T b + A a^T
    (orthogonal Procrustes), so that signs and order of singular vectors cannot turn what devices go on from.
    Where the product has a rank below r, as before the first step (B = 0), rows of A keep what the
    current A has beside the product's row space, or nothing could ever be learnt there: both factors would be 0.

    Args:
        product: matrix to factorise, (out, in).
        a: current A, (r, in).
        b: current B, (out, r).

    Returns:
        the new A and the new B.
    """
    rank = len(a)
    left, singular, right = np.linalg.svd(product, full_matrices=False)
    found = int((singular[:rank] > NOISE * singular[0]).sum())
    roots = np.sqrt(singular[:found])
    new_a, new_b = np.zeros_like(a), np.zeros_like(b)
    new_b[:, :found] = left[:, :found] * roots
    new_a[:found] = roots[:, None] * right[:found]
    if found < rank:
        beside = a - a @ right[:found].T @ right[:found]
        _, sizes, directions = np.linalg.svd(beside, full_matrices=False)
        new_a[found:] = (sizes[:, None] * directions)[: rank - found]
    u, _, vt = np.linalg.svd(new_b.T @ b + new_a @ a.T)
    turn = u @ vt
    return turn.T @ new_a, new_b @ turn


def _has_pair(spec: SliceSpec) -> bool:
    return spec.kind in KINDS and KINDS[spec.kind].pair is not None


def _names(spec: SliceSpec) -> tuple[str, str]:
    pair = KINDS[spec.kind].pair
    if pair is None:
        raise PackageError(f"slice {spec.name} of kind {spec.kind} has no product of two factors")
    return key(spec.name, pair[0]), key(spec.name, pair[1])


def _double(factor: FloatArray | DoubleArray) -> DoubleArray:
    """A factor as a float64 matrix, without the example axis."""
    return np.asarray(factor, np.float64).squeeze(0)
