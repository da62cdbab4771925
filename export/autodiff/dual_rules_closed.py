"""Tangent rules in closed form that reuse the value: functions of one element, softmax, normalisations.

Derivatives are the textbook ones; each is arranged so that the factor of x' is computed once, on the primal
row, and so that few tensors as wide as the tangent are alive at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from export.autodiff.dual_rules import MissingRuleError, Zero, axis_of_tangent, rule

aten = torch.ops.aten


# --- element by element: y' = f'(x) x' -------------------------------------------------------------------


@rule(aten.exp.default)
def _exp(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    y = torch.exp(args[0])
    return y, dots[0] * y


@rule(aten.rsqrt.default)
def _rsqrt(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    y = torch.rsqrt(args[0])
    return y, dots[0] * (-0.5 * y * y * y)


@rule(aten.tanh.default)
def _tanh(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    y = torch.tanh(args[0])
    return y, dots[0] * (1 - y * y)


@rule(aten.sigmoid.default)
def _sigmoid(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    y = torch.sigmoid(args[0])
    return y, dots[0] * (y - y * y)


@rule(aten.silu.default)
def _silu(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    gate = torch.sigmoid(args[0])
    y = args[0] * gate
    # y = x σ(x), y' = (σ + xσ(1 - σ)) x' = (σ + y - yσ) x'
    return y, dots[0] * (gate + (y - y * gate))


@rule(aten.pow.Tensor_Scalar)
def _power(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, exponent = args
    y = aten.pow(x, exponent)
    below = x if exponent == 2 else aten.pow(x, exponent - 1)
    return y, dots[0] * (below * exponent)


@rule(aten.relu.default)
def _relu(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x = args[0]
    return torch.relu(x), dots[0] * (x > 0).to(x.dtype)


@rule(aten.gelu.default)
def _gelu(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    # The value is the operator itself, and the slope a chain that needs the input only: at no time are more
    # than three tensors of the primal's width alive.
    x = args[0]
    slope = tanh_gelu_slope(x) if kwargs.get("approximate", "none") == "tanh" else gelu_slope(x)
    return aten.gelu(x, **kwargs), dots[0] * slope


def gelu_slope(x: Tensor) -> Tensor:
    """Slope of y = x Φ(x), which is Φ(x) + x φ(x), with t = x/√2: Φ = (1 + erf t)/2, x φ = t exp(-t²)/√π."""
    t = x * math.sqrt(0.5)
    density = t * torch.exp(t * -t) * (2 / math.sqrt(math.pi))
    return 0.5 * (1 + (torch.erf(t) + density))


def tanh_gelu_slope(x: Tensor) -> Tensor:
    """Slope of y = x (1 + t)/2 with t = tanh(c (x + a x³)), c = √(2/π) and a = 0.044715."""
    square = x * x
    t = torch.tanh(x * (math.sqrt(2 / math.pi) * (1 + 0.044715 * square)))
    inner_slope = math.sqrt(2 / math.pi) * (1 + 0.134145 * square)
    return 0.5 * (1 + (t + x * ((1 - t * t) * inner_slope)))


# --- along an axis ---------------------------------------------------------------------------------------


@rule(aten.softmax.int)
def _softmax(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    y = aten.softmax(*args, **kwargs)
    x_dot = _as_dtype_of(y, dots[0])
    # y' = y (x' - Σ y x'), which needs one tensor less at a time than y x' - y Σ y x'.
    return y, y * (x_dot - (y * x_dot).sum(axis_of_tangent(args[1]), keepdim=True))


@rule(aten.log_softmax.int)
def _log_softmax(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    y = aten.log_softmax(*args, **kwargs)
    x_dot = _as_dtype_of(y, dots[0])
    return y, x_dot - (torch.exp(y) * x_dot).sum(axis_of_tangent(args[1]), keepdim=True)


@rule(aten.logsumexp.default)
def _log_sum_exp(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, axes, keep = args[0], args[1], len(args) > 2 and bool(args[2])
    if len(axes) != 1 or axes[0] not in (-1, x.dim() - 1):
        raise MissingRuleError("a logarithm of a sum over other axes than the last has no rule")
    kept = aten.logsumexp(x, [-1], True)
    # y' = softmax(x)·x', a product of a row and a column, so that no second tensor of x's size is made for it.
    shares = torch.exp(x - kept)
    dot = torch.matmul(shares.unsqueeze(-2), dots[0].unsqueeze(-1)).squeeze([-1])
    return (kept, dot) if keep else (kept.squeeze([-1]), dot.squeeze([-1]))


def _as_dtype_of(value: Tensor, dot: Tensor) -> Tensor:
    """A tangent in the type its value was asked for in; no operation where it has that type."""
    return dot if dot.dtype == value.dtype else dot.to(value.dtype)


@rule(aten.rms_norm.default)
def _rms_norm(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = args[:2]
    weight = args[2] if len(args) > 2 else None
    epsilon = args[3] if len(args) > 3 and args[3] is not None else torch.finfo(x.dtype).eps
    if any(not isinstance(dot, Zero) for dot in dots[2:]):
        raise MissingRuleError("RMSNorm's own weight carries a tangent; attach a slice to a linear layer")
    axes = list(range(-len(shape), 0))
    scale = torch.rsqrt((x * x).mean(axes, keepdim=True) + epsilon)
    normal = x * scale
    # y' = w·scale·(x' - n·mean(n·x')) with n the normalised input
    normal_dot = (dots[0] - normal * (normal * dots[0]).mean(axes, keepdim=True)) * scale
    return (normal, normal_dot) if weight is None else (normal * weight, normal_dot * weight)


@rule(aten.layer_norm.default)
def _layer_norm(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = args[:2]
    weight, bias = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
    epsilon = args[4] if len(args) > 4 else 1e-5
    if any(not isinstance(dot, Zero) for dot in dots[2:]):
        raise MissingRuleError("LayerNorm's own weight carries a tangent; attach a slice to a linear layer")
    y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, epsilon)
    axes = list(range(-len(shape), 0))
    normal = (x - mean) * rstd
    x_dot = dots[0]
    # y' = w·rstd·(x' - mean(x') - n·mean(n·x')) with n the normalised input
    centred = x_dot - x_dot.mean(axes, keepdim=True)
    normal_dot = (centred - normal * (normal * x_dot).mean(axes, keepdim=True)) * rstd
    return y, normal_dot if weight is None else normal_dot * weight
