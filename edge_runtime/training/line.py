"""The loss along one line: what a server needs to set its rate by itself.

Along a direction u the loss of example i has the derivative a_i = ∇ℓ_i·u. Its curvature follows from loss and
derivative alone. With p the probability of the label, cross-entropy is ℓ = log(1 + e^-m) in the margin m between the
label's logit and the log-sum-exp of the others; so dℓ/dm = -(1 - p) and d²ℓ/dm² = p(1 - p), and the Gauss-Newton term
of the margin is

    w_i a_i²,       w_i = p / (1 - p) = 1 / (e^ℓ_i - 1).

It is exact for two classes, and a part of the whole for more, since what is left is positive semidefinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge_runtime.errors import SliceError
from edge_runtime.package.slices import FloatArray, Values

#: Name under which slope and curvature, float32 (2,), travel beside a task's change.
LINE = "line/moments"

#: Losses below this one count as it: w grows without bound as a loss goes to zero, while a_i² goes to zero faster.
LEAST_LOSS = 1e-3


def along_line(jvps: FloatArray, losses: FloatArray) -> tuple[float, float]:
    """Mean slope and curvature over some examples.

    Args:
        jvps: derivative of each example's loss along the line, (B,).
        losses: cross-entropy of each example, (B,).
    """
    slopes = jvps.astype(np.float64)
    weights = 1 / np.expm1(np.maximum(losses.astype(np.float64), LEAST_LOSS))
    return float(slopes.mean()), float((weights * slopes * slopes).mean())


def mean_along(steps: Sequence[tuple[float, float]]) -> Values:
    """Slope and curvature of a task's steps as a tensor to travel; empty where no step measured any."""
    if not steps:
        return {}
    return {LINE: np.asarray(steps, np.float64).mean(axis=0).astype(np.float32)}


def without_line(data: bytes) -> tuple[bytes, tuple[float, float] | None]:
    """A change as it would be without slope and curvature, and these two; None if the device did not measure them.

    Args:
        data: safetensors bytes from outside.

    Raises:
        SliceError: the bytes are no safetensors file; or slope and curvature are not two finite float32 numbers, of
            which the curvature is not below zero.
    """
    try:
        change: Values = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SliceError(f"a change is not a safetensors file: {error}") from error
    found = change.pop(LINE, None)
    if found is None:
        return data, None
    if found.shape != (2,) or found.dtype != np.float32 or not np.isfinite(found).all() or found[1] < 0:
        raise SliceError(f"{LINE} must be two finite float32 numbers: a slope, and a curvature of at least 0")
    return save(change), (float(found[0]), float(found[1]))
