"""Filtered directions: of many normal candidates, those nearest to where the model moved last (FwdLLM, ATC 2024).

For each tensor by itself, candidates·K normal directions are drawn. The K with the largest cosine to the tensor's
reference are kept, the nearest first, and of equal ones the earlier. The reference is the server's last averaged
change. It points against the gradient, but nothing is negated: the estimate (∇ℓ·v)v is the same for v and -v, and
candidates are as likely as their negatives, so keeping those nearest to the change is, in law, keeping those nearest to
the gradient. Without a reference, or where a tensor of it is zero, the first K candidates are kept.

A server that replays must choose the same ones. Entries are whole multiples of a grain, and the reference is rounded to
20 bits of its largest entry. So products are sums of integers, which are exact in any order, and only a square root and
a division remain, which IEEE 754 defines to the last bit.

Candidates are drawn one at a time, and the chosen ones a second time, so that only K directions and one candidate are
in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from edge_runtime.errors import SliceError
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.package.slices import FloatArray, Values, shapes

_LEVELS = 2.0**20


def draw_filtered(
    candidate: Callable[[int], FloatArray],
    specs: Sequence[SliceSpec],
    draws: int,
    candidates: int,
    reference: Values | None,
    grain: float,
) -> FloatArray:
    """Directions (K, 1, d), chosen for each tensor by itself.

    Args:
        candidate: function that gives the direction (d,) of a number from 0 to candidates·K - 1.
        specs: slices whose tensors lie side by side in a direction.
        draws: number K of directions.
        candidates: number of candidates for each direction.
        reference: values to compare with, by flat name; None keeps the first K candidates.
        grain: number of which all entries of candidates are whole multiples.

    Raises:
        SliceError: the reference lacks a tensor, or has it in another shape.
    """
    if reference is not None:
        check_reference(reference, specs)
    if reference is None or candidates == 1:
        # With one candidate for each draw a filter would only reorder them.
        return np.stack([candidate(number) for number in range(draws)])[:, None]
    parts = _parts(specs)
    chosen = _choose(candidate, parts, draws, candidates, _whole(reference, specs), grain)
    flat = np.empty((draws, 1, sum(spec.dimensions for spec in specs)), dtype=np.float32)
    for number in sorted({int(number) for kept in chosen.values() for number in kept}):
        drawn = candidate(number)
        for name, part in parts.items():
            flat[chosen[name] == number, 0, part] = drawn[part]
    return flat


def check_reference(reference: Values, specs: Sequence[SliceSpec]) -> None:
    """Check that a reference has every tensor of the slices.

    Raises:
        SliceError: it lacks a tensor, or has it in another shape.
    """
    for name, shape in shapes(specs).items():
        if name not in reference:
            raise SliceError(f"the reference lacks tensor {name}, which directions are to be compared with")
        if reference[name].shape != shape:
            raise SliceError(
                f"tensor {name} of the reference has shape {reference[name].shape}, expected {shape}"
            )


def decode_reference(data: bytes, specs: Sequence[SliceSpec]) -> Values:
    """Parse and check a reference.

    Args:
        data: safetensors bytes from outside, of the form of slice values.
        specs: slices whose gradient is estimated; the reference may hold more.

    Raises:
        SliceError: the bytes are not safetensors; or a tensor is missing, of another shape or dtype, or not finite.
            Names the tensor.
    """
    try:
        reference: Values = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SliceError(f"the reference is not a safetensors file: {error}") from error
    check_reference(reference, specs)
    for name in shapes(specs):
        if reference[name].dtype != np.float32 or not np.isfinite(reference[name]).all():
            raise SliceError(f"tensor {name} of the reference must be finite float32")
    return {name: reference[name] for name in shapes(specs)}


def _choose(
    candidate: Callable[[int], FloatArray],
    parts: Mapping[str, slice],
    draws: int,
    candidates: int,
    reference: Mapping[str, NDArray[np.int64]],
    grain: float,
) -> dict[str, NDArray[np.int64]]:
    """Numbers of the K candidates nearest to the reference, for each tensor, the nearest first."""
    cosines = {name: np.zeros(candidates * draws) for name in parts}
    for number in range(candidates * draws):
        drawn = np.rint(candidate(number) / np.float32(grain)).astype(np.int64)
        for name, part in parts.items():
            product, square = int(drawn[part] @ reference[name]), int(drawn[part] @ drawn[part])
            cosines[name][number] = product / np.sqrt(float(square)) if square else 0.0
    return {name: np.argsort(-each, kind="stable")[:draws] for name, each in cosines.items()}


def _whole(reference: Values, specs: Sequence[SliceSpec]) -> dict[str, NDArray[np.int64]]:
    """The reference's tensors as integers of 20 bits."""
    rounded = {}
    for name in shapes(specs):
        flat = reference[name].astype(np.float64).ravel()
        largest = np.abs(flat).max(initial=0.0)
        rounded[name] = np.rint(flat / (largest or 1.0) * _LEVELS).astype(np.int64)
    return rounded


def _parts(specs: Sequence[SliceSpec]) -> dict[str, slice]:
    """Place of each tensor in a direction."""
    parts, start = {}, 0
    for name, shape in shapes(specs).items():
        size = int(np.prod(shape))
        parts[name] = slice(start, start + size)
        start += size
    return parts
