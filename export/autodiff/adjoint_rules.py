"""Adjoint rules: how a cotangent passes back through each operator, and the table that holds every rule.

A rule computes an operator's value and returns with it a *pullback*: given the cotangent of the value and the position
of a tensor argument (in a list argument: its place in the list), it gives that argument's cotangent. Only positions
that lead to something wanted are asked for. Where an argument was broadcast, the interpreter sums afterwards
(``export.autodiff.adjoint``); a rule need not.

A cotangent may have sides of 1 where its value is longer, and then stands for the same entries all along: that saves
expanding what the next product broadcasts anyway. Rules outside :data:`ELEMENTWISE` get it in full.

The formulas are the textbook ones (Griewank & Walther, Evaluating Derivatives, 2008, ch. 3.2), transposes of the
tangent rules in ``export.autodiff.dual_rules``; softmax and normalisations reuse the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from export.autodiff.dual_rules import MissingRuleError
from export.autodiff.dual_rules_closed import gelu_slope, tanh_gelu_slope
from export.model.top_activations import largest, pick, place
from export.quantisation.quantise import frozen_linear, frozen_linear_transposed

aten = torch.ops.aten
#: Cotangent of the value, position of the argument → cotangent of the argument.
Pullback = Callable[[Tensor, int], Any]
AdjointRule = Callable[[Sequence[Any], dict[str, Any]], tuple[Any, Pullback]]
ADJOINT_RULES: dict[Any, AdjointRule] = {}
#: Sizes and indices: piecewise constant, so that no cotangent passes.
CONSTANT = frozenset({aten.sym_size.int, aten.argmax.default, largest})
#: Operators whose pullback works entry by entry, so that it may be given a cotangent with sides of 1.
ELEMENTWISE: set[Any] = set()


def adjoint_rule(*operators: Any, elementwise: bool = False) -> Callable[[AdjointRule], AdjointRule]:
    """Register a rule for operators."""

    def register(function: AdjointRule) -> AdjointRule:
        for operator in operators:
            ADJOINT_RULES[operator] = function
            if elementwise:
                ELEMENTWISE.add(operator)
        return function

    return register


# --- linear in one argument ------------------------------------------------------------------------------


def _linear(operator: Any, back: Callable[[Sequence[Any], Tensor], Tensor]) -> None:
    """A linear operator by its transpose, a function of the arguments and the cotangent."""

    def apply(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
        return operator(*args, **kwargs), lambda bar, _: back(args, bar)

    ADJOINT_RULES[operator] = apply


def _inverse(order: Sequence[int]) -> list[int]:
    axes = [axis % len(order) for axis in order]
    return [axes.index(axis) for axis in range(len(axes))]


_linear(aten.neg.default, lambda args, bar: -bar)
_linear(aten.clone.default, lambda args, bar: bar)
_linear(aten._to_copy.default, lambda args, bar: bar if bar.dtype == args[0].dtype else bar.to(args[0].dtype))
_linear(aten.permute.default, lambda args, bar: aten.permute(bar, _inverse(args[1])))
_linear(aten.transpose.int, lambda args, bar: aten.transpose(bar, args[1], args[2]))
_linear(aten.unsqueeze.default, lambda args, bar: aten.squeeze(bar, [args[1] % bar.dim()]))
_linear(aten.squeeze.dims, lambda args, bar: aten.reshape(bar, args[0].shape))
_linear(aten.reshape.default, lambda args, bar: aten.reshape(bar, args[0].shape))
_linear(aten.view.default, lambda args, bar: aten.reshape(bar, args[0].shape))
_linear(aten.expand.default, lambda args, bar: bar)
_linear(pick, lambda args, bar: place(bar, args[1], args[0].shape[-1]))
_linear(place, lambda args, bar: pick(bar, args[1]))
ELEMENTWISE.update((aten.neg.default, aten.clone.default, aten._to_copy.default))


@adjoint_rule(aten.sum.dim_IntList)
def _sum(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    return aten.sum(*args, **kwargs), lambda bar, _: _with_reduced_axes(args, kwargs, bar)


@adjoint_rule(aten.mean.dim)
def _mean(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    count = math.prod(args[0].shape[axis] for axis in _reduced(args))
    return aten.mean(*args, **kwargs), lambda bar, _: _with_reduced_axes(args, kwargs, bar / count)


def _reduced(args: Sequence[Any]) -> list[int]:
    """Axes over which a reduction runs; none named means all."""
    rank = args[0].dim()
    return sorted(axis % rank for axis in (args[1] if len(args) > 1 and args[1] else range(rank)))


def _with_reduced_axes(args: Sequence[Any], kwargs: dict[str, Any], bar: Tensor) -> Tensor:
    """The cotangent with a side of 1 wherever the reduction ran."""
    if args[2] if len(args) > 2 else kwargs.get("keepdim", False):
        return bar
    for axis in _reduced(args):
        bar = bar.unsqueeze(axis)
    return bar


@adjoint_rule(aten.slice.Tensor)
def _slice(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    x, axis = args[0], (args[1] if len(args) > 1 else 0) % args[0].dim()
    if (args[4] if len(args) > 4 else 1) != 1:
        raise MissingRuleError("a slice with steps has no rule")
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    y = aten.slice(*args, **kwargs)
    side = x.shape[axis]
    before = start + side if start < 0 else start
    return y, lambda bar, _: _padded(bar, axis, before, side - before - y.shape[axis])


@adjoint_rule(aten.select.int)
def _select(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, axis, index = args[0], args[1] % args[0].dim(), args[2]
    side = x.shape[axis]
    before = index + side if index < 0 else index
    return aten.select(*args), lambda bar, _: _padded(bar.unsqueeze(axis), axis, before, side - before - 1)


def _padded(bar: Tensor, axis: int, before: Any, after: Any) -> Tensor:
    """Zeros before and after along an axis."""
    padding = [0, 0] * (bar.dim() - 1 - axis)
    padded: Tensor = aten.constant_pad_nd(bar, [*padding, before, after], 0.0)
    return padded


@adjoint_rule(aten.cat.default)
def _cat(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    parts, axis = args[0], (args[1] if len(args) > 1 else 0) % args[0][0].dim()

    def pull(bar: Tensor, position: int) -> Tensor:
        start = sum(part.shape[axis] for part in parts[:position])
        piece: Tensor = aten.slice(bar, axis, start, start + parts[position].shape[axis])
        return piece

    return aten.cat(parts, axis), pull


@adjoint_rule(aten.gather.default)
def _gather(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, axis, index = args[:3]
    return aten.gather(x, axis, index), lambda bar, _: torch.zeros_like(x).scatter_add(axis, index, bar)


@adjoint_rule(aten.index_select.default)
def _index_select(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, axis, index = args
    sides = [1] * x.dim()
    sides[axis] = -1

    def pull(bar: Tensor, _: int) -> Tensor:
        places = index.to(torch.int64).reshape(sides).expand(bar.shape)
        return torch.zeros_like(x).scatter_add(axis, places, bar)

    return aten.index_select(x, axis, index), pull


# --- products --------------------------------------------------------------------------------------------


@adjoint_rule(aten.linear.default)
def _linear_layer(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, weight = args[:2]

    def pull(bar: Tensor, position: int) -> Tensor:
        if position != 0:
            raise MissingRuleError(
                "a linear layer's own weight is trained; attach a slice to the layer instead"
            )
        return torch.matmul(bar, weight)

    return aten.linear(x, weight, args[2] if len(args) > 2 else None), pull


@adjoint_rule(frozen_linear)
def _frozen_linear(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    stored = args[1:4]
    return frozen_linear(*args), lambda bar, _: frozen_linear_transposed(bar, *stored)


@adjoint_rule(aten.matmul.default)
def _matmul(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    a, b = args
    if a.dim() < 2 or b.dim() < 2:
        raise MissingRuleError("a product with a vector has no rule")

    def pull(bar: Tensor, position: int) -> Tensor:
        if position == 0:
            return torch.matmul(bar, b.transpose(-1, -2))
        return torch.matmul(a.transpose(-1, -2), bar)

    return torch.matmul(a, b), pull


@adjoint_rule(aten.mul.Tensor, elementwise=True)
def _mul(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    a, b = args
    return a * b, lambda bar, position: bar * (a if position else b)


@adjoint_rule(aten.div.Tensor, elementwise=True)
def _div(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    a, b = args
    y = a / b
    return y, lambda bar, position: -(bar * y) / b if position else bar / b


# --- sums ------------------------------------------------------------------------------------------------


def _scaled(bar: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return bar
    return -bar if factor == -1 else bar * factor


@adjoint_rule(aten.add.Tensor, elementwise=True)
def _add(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    factor = kwargs.get("alpha", 1)
    return torch.add(*args, **kwargs), lambda bar, position: _scaled(bar, factor if position else 1)


@adjoint_rule(aten.sub.Tensor, elementwise=True)
def _sub(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    factor = -kwargs.get("alpha", 1)
    return torch.sub(*args, **kwargs), lambda bar, position: _scaled(bar, factor if position else 1)


# --- selections ------------------------------------------------------------------------------------------


@adjoint_rule(aten.where.self, elementwise=True)
def _where(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    condition = args[0]

    def pull(bar: Tensor, position: int) -> Tensor:
        return torch.where(condition, bar, 0.0) if position == 1 else torch.where(condition, 0.0, bar)

    return aten.where(*args), pull


@adjoint_rule(aten.masked_fill.Scalar, elementwise=True)
def _masked_fill(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    return aten.masked_fill(*args), lambda bar, _: torch.where(args[1], 0.0, bar)


# --- element by element: x̄ = f'(x) ȳ ---------------------------------------------------------------------


def _by_slope(operator: Any, slope: Callable[[Sequence[Any], Any], Tensor]) -> None:
    """An operator of one element by its slope, a function of the arguments and the value."""

    def apply(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
        y = operator(*args, **kwargs)
        return y, lambda bar, _: bar * slope(args, y)

    ADJOINT_RULES[operator] = apply
    ELEMENTWISE.add(operator)


_by_slope(aten.exp.default, lambda args, y: y)
_by_slope(aten.rsqrt.default, lambda args, y: -0.5 * y * y * y)
_by_slope(aten.tanh.default, lambda args, y: 1 - y * y)
_by_slope(aten.sigmoid.default, lambda args, y: y - y * y)
_by_slope(aten.relu.default, lambda args, y: (args[0] > 0).to(args[0].dtype))
_by_slope(
    aten.pow.Tensor_Scalar,
    lambda args, y: (args[0] if args[1] == 2 else aten.pow(args[0], args[1] - 1)) * args[1],
)


@adjoint_rule(aten.silu.default, elementwise=True)
def _silu(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    gate = torch.sigmoid(args[0])
    y = args[0] * gate
    return y, lambda bar, _: bar * (gate + (y - y * gate))


@adjoint_rule(aten.gelu.default, elementwise=True)
def _gelu(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    slope = tanh_gelu_slope if kwargs.get("approximate", "none") == "tanh" else gelu_slope
    return aten.gelu(args[0], **kwargs), lambda bar, _: bar * slope(args[0])


# --- along an axis ---------------------------------------------------------------------------------------


@adjoint_rule(aten.softmax.int)
def _softmax(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    y = aten.softmax(*args, **kwargs)

    def pull(bar: Tensor, _: int) -> Tensor:
        return _as_dtype_of(args[0], y * (bar - (y * bar).sum(args[1], keepdim=True)))

    return y, pull


@adjoint_rule(aten.log_softmax.int)
def _log_softmax(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Pullback]:
    y = aten.log_softmax(*args, **kwargs)

    def pull(bar: Tensor, _: int) -> Tensor:
        return _as_dtype_of(args[0], bar - torch.exp(y) * bar.sum(args[1], keepdim=True))

    return y, pull


@adjoint_rule(aten.logsumexp.default)
def _log_sum_exp(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, axes, keep = args[0], args[1], len(args) > 2 and bool(args[2])
    kept = aten.logsumexp(x, axes, True)

    def pull(bar: Tensor, _: int) -> Tensor:
        return torch.exp(x - kept) * _with_reduced_axes([x, axes, keep], {}, bar)

    return kept if keep else kept.squeeze(axes), pull


def _as_dtype_of(value: Tensor, bar: Tensor) -> Tensor:
    return bar if bar.dtype == value.dtype else bar.to(value.dtype)


@adjoint_rule(aten.rms_norm.default)
def _rms_norm(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, shape = args[:2]
    weight = args[2] if len(args) > 2 else None
    epsilon = args[3] if len(args) > 3 and args[3] is not None else torch.finfo(x.dtype).eps
    axes = list(range(-len(shape), 0))
    scale = torch.rsqrt((x * x).mean(axes, keepdim=True) + epsilon)
    normal = x * scale

    def pull(bar: Tensor, position: int) -> Any:
        _refuse_own_weight("RMSNorm", position)
        # x̄ = scale·(g - n·mean(n·g)) with g = w·ȳ and n the normalised input
        given = bar if weight is None else bar * weight
        return (given - normal * (normal * given).mean(axes, keepdim=True)) * scale

    return normal if weight is None else normal * weight, pull


@adjoint_rule(aten.layer_norm.default)
def _layer_norm(args: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Pullback]:
    x, shape = args[:2]
    weight, bias = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
    epsilon = args[4] if len(args) > 4 else 1e-5
    y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, epsilon)
    axes = list(range(-len(shape), 0))

    def pull(bar: Tensor, position: int) -> Any:
        _refuse_own_weight("LayerNorm", position)
        # x̄ = rstd·(g - mean(g) - n·mean(n·g)) with g = w·ȳ and n the normalised input
        normal = (x - mean) * rstd
        given = bar if weight is None else bar * weight
        centred = given - given.mean(axes, keepdim=True)
        return (centred - normal * (normal * given).mean(axes, keepdim=True)) * rstd

    return y, pull


def _refuse_own_weight(layer: str, position: int) -> None:
    if position != 0:
        raise MissingRuleError(f"{layer}'s own weight is trained; attach a slice to a linear layer")
