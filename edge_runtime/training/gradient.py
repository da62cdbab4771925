"""The two gradients of a step: estimated for slices, exact for the head (or estimated too).

With tangents v_{k,i} of independent ±1 entries (draw k of K, example i of B, d entries) and
j_{k,i} = ∇ℓ_i·v_{k,i}, the estimate

    ĝ = 1/(K·B) Σ_{k,i} j_{k,i} v_{k,i}

has mean ḡ = 1/B Σ_i ∇ℓ_i, because E[v vᵀ] = I (Baydin et al. 2022, arXiv 2202.08587, section 3). For one
direction E‖(g·v)v‖² = d‖g‖², hence the expected squared error:

* directions per example: independent terms, E‖ĝ - ḡ‖² = (d - 1)/(K·B) · mean_i ‖∇ℓ_i‖²;
* one direction shared by the batch: (d - 1)/K · ‖ḡ‖².

Both fall as 1/K and grow as d - 1; standard normal entries, whose fourth moment is 3 instead of 1, give d + 1. Per
example is better where mean_i ‖∇ℓ_i‖² < B‖ḡ‖². For independent examples with mean gradient μ and variance σ² the two
sides are, on average, ‖μ‖² + σ² and B‖μ‖² + σ²: per example never loses on average, and gains B times where examples
agree.

The head is linear in its features, so its gradient is closed: ∂ℓ/∂W = (softmax - onehot)·featureᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.package.slices import HEAD_PREFIX, FloatArray, Values, key


def estimate(jvps: FloatArray, tangents: Mapping[str, FloatArray]) -> Values:
    """ĝ for every estimated tensor, equal to the last bit on every machine.

    Args:
        jvps: (K, B) directional derivatives of each example's loss.
        tangents: (K, B, *s) tangents of slice tensors and (K, B, *shape) of the head's, by flat name.

    Returns:
        The mean over draws and examples, (1, *s) for slice tensors and of their own shape for the head's, by flat name.
        It is summed draw by draw in float64, all tensors side by side.
    """
    draws, batch = jvps.shape
    weights = jvps.astype(np.float64)
    flat = np.concatenate([tangent.reshape(draws, batch, -1) for tangent in tangents.values()], axis=2)
    total, term = np.zeros(flat.shape[2]), np.empty(flat.shape[2])
    # A matrix product would sum in an order of the CPU's own.
    for draw in range(draws):
        for example in range(batch):
            total += np.multiply(flat[draw, example], weights[draw, example], out=term, dtype=np.float64)
    mean = (total / (draws * batch)).astype(np.float32)
    gradient: Values = {}
    start = 0
    for name, tangent in tangents.items():
        own = tangent.shape[2:]
        size = int(np.prod(own))
        shape = own if name.startswith(HEAD_PREFIX) else (1, *own)
        gradient[name] = mean[start : start + size].reshape(shape)
        start += size
    return gradient


def shared_jvps(jvps: FloatArray) -> FloatArray:
    """Mean over the examples of (K, B) directional derivatives along shared directions: (K, 1), summed in order."""
    total = np.zeros(jvps.shape[0])
    for column in jvps.T.astype(np.float64):
        total += column
    mean: FloatArray = (total / jvps.shape[1]).astype(np.float32)
    return mean[:, None]


def clamped(jvps: FloatArray, limit: float | None) -> FloatArray:
    """Directional derivatives within [-limit, limit]; None leaves them as they are."""
    return jvps if limit is None else np.clip(jvps, np.float32(-limit), np.float32(limit))


def head_jvps(
    residual: FloatArray, features: FloatArray, tangents: Mapping[str, FloatArray], head: str = "head"
) -> FloatArray:
    """Directional derivatives (K, B) of each example's loss along tangents of the head.

    With tangents V of the weight and v of the bias the logits move by V·feature + v, and the loss's gradient in the
    logits is the residual: the derivative is residual·(V·feature + v). No program carries the head's tangent.

    Args:
        residual: (B, C) softmax minus one-hot.
        features: (B, H) input of the head.
        tangents: tangents by flat name, among them ``head/weight`` (K, b, C, H) and, of a head that has one,
            ``head/bias`` (K, b, C), b = B or 1.
        head: name of the head's slice.
    """
    moved = np.matmul(tangents[key(head, "weight")], features[:, :, None])[..., 0]
    if (bias := tangents.get(key(head, "bias"))) is not None:
        moved = moved + bias
    jvps: FloatArray = (residual * moved).sum(axis=-1, dtype=np.float32)
    return jvps


def head_gradient(
    residual: FloatArray, features: FloatArray, head: str = "head", *, has_bias: bool = True
) -> Values:
    """Exact mean gradient of the head.

    Args:
        residual: (B, C) softmax minus one-hot.
        features: (B, H) input of the head.
        head: name of the head's slice.
        has_bias: whether the head has a bias.

    Returns:
        ``head/weight`` (C, H) and ``head/bias`` (C,).
    """
    gradient: Values = {key(head, "weight"): (residual.T @ features / residual.shape[0]).astype(np.float32)}
    if has_bias:
        gradient[key(head, "bias")] = residual.mean(axis=0, dtype=np.float32)
    return gradient
