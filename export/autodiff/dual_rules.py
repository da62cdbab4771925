"""Tangent rules of operators that are linear or bilinear, and the table that holds every rule.

A rule computes an operator's value and tangent together. The tangent of a tensor of shape S has shape
(K, *S); where S has length 1 along an axis the tangent may be longer (see ``export.autodiff.dual``). Rules whose
closed form reuses the value are in ``export.autodiff.dual_rules_closed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from edge_runtime.errors import ModelError
from export.model.top_activations import largest, pick, place
from export.quantisation.quantise import frozen_linear

aten = torch.ops.aten


class Zero:
    """The tangent of whatever does not depend on a trained slice."""

    def __repr__(self) -> str:
        return "ZERO"


ZERO: Final = Zero()
Tangent = Tensor | Zero
#: A rule takes positional arguments, their tangents (ZERO for non-tensors) and keyword arguments, and
#: gives the result with its tangent. It is only called when some tangent is not ZERO.
Rule = Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], tuple[Any, Any]]
RULES: dict[Any, Rule] = {}
#: Operators that take a list of tensors, and whose rules read the list's tangents.
LISTED = frozenset({aten.cat.default})


class MissingRuleError(ModelError):
    """The model uses an operator for which no tangent rule exists; names operator and node."""


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def align(dot: Tensor, rank: int, to_rank: int) -> Tensor:
    """Insert unit axes after K so that a tangent of a rank-``rank`` value broadcasts at ``to_rank``."""
    for _ in range(to_rank - rank):
        dot = dot.unsqueeze(1)
    return dot


def add_tangents(a: Tangent, b: Tangent) -> Tangent:
    """Sum of two tangents, either of which may be ZERO."""
    if isinstance(a, Zero):
        return b
    if isinstance(b, Zero):
        return a
    return a + b


# --- linear in one argument: the tangent takes the same operator, its axes shifted by the leading K -----


def _linear(operator: Any, shift: Callable[[Sequence[Any], Tensor], Sequence[Any]]) -> None:
    def apply(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return operator(*args, **kwargs), operator(dots[0], *shift(args, dots[0]), **kwargs)

    RULES[operator] = apply


def axis_of_tangent(axis: int) -> int:
    """An axis of the primal as an axis of its tangent."""
    return axis + 1 if axis >= 0 else axis


def _reduced(args: Sequence[Any]) -> list[int]:
    """Axes of the tangent over which a reduction runs; none named means all, but never the leading K."""
    return [axis_of_tangent(axis) for axis in args[1] or range(args[0].dim())]


_linear(aten.neg.default, lambda args, dot: ())
_linear(aten.clone.default, lambda args, dot: ())
_linear(aten.permute.default, lambda args, dot: ([0, *(axis % args[0].dim() + 1 for axis in args[1])],))
_linear(aten.transpose.int, lambda args, dot: (axis_of_tangent(args[1]), axis_of_tangent(args[2])))
_linear(aten.unsqueeze.default, lambda args, dot: (axis_of_tangent(args[1]),))
_linear(aten.squeeze.dims, lambda args, dot: ([axis_of_tangent(axis) for axis in args[1]],))
_linear(aten._to_copy.default, lambda args, dot: ())
_linear(aten.select.int, lambda args, dot: (axis_of_tangent(args[1]), args[2]))
_linear(aten.slice.Tensor, lambda args, dot: (axis_of_tangent(args[1]), *args[2:]))
_linear(aten.index_select.default, lambda args, dot: (axis_of_tangent(args[1]), args[2]))
_linear(aten.sum.dim_IntList, lambda args, dot: (_reduced(args), *args[2:]))
_linear(aten.mean.dim, lambda args, dot: (_reduced(args), *args[2:]))


@rule(aten.reshape.default, aten.view.default)
def _reshape(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = args
    # The tangent keeps its K, and a -1 in the shape keeps its meaning: for a tangent longer along the first axis too.
    if longer := _longer_axes(x, dots[0]):
        kept_apart = longer == [0] and shape[0] == -1 and all(isinstance(side, int) for side in shape[1:])
        if not kept_apart or math.prod(shape[1:]) != math.prod(x.shape[1:]):
            raise MissingRuleError("a reshape joins an axis along which the tangent differs by example")
    return aten.reshape(x, shape), aten.reshape(dots[0], [dots[0].shape[0], *shape])


def _longer_axes(x: Tensor, dot: Tensor) -> list[int]:
    """Axes of length 1 along which a tangent is longer; a symbolic side counts as longer, and is not asked for."""

    def is_one(side: Any) -> bool:
        return isinstance(side, int) and side == 1

    sides = zip(x.shape, dot.shape[1:], strict=True)
    return [axis for axis, (side, of_dot) in enumerate(sides) if is_one(side) and not is_one(of_dot)]


@rule(aten.expand.default)
def _expand(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = args
    new = len(shape) - x.dim()
    # Where a side of 1 stays 1, the tangent keeps what it has, which may be more.
    kept = [-1 if isinstance(side, int) and side == 1 else side for side in shape[new:]]
    dot = align(dots[0], x.dim(), len(shape))
    return aten.expand(x, shape), dot.expand(-1, *shape[:new], *kept)


@rule(aten.cat.default)
def _cat(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    parts, axis = args[0], (args[1] if len(args) > 1 else 0) % args[0][0].dim()
    # Parts without entries (Phi-3 rotates whole heads, and joins the rest) are left out.
    some = [
        i for i, part in enumerate(parts) if not (isinstance(part.shape[axis], int) and part.shape[axis] == 0)
    ]
    parts, dots = [parts[i] for i in some], [[dots[0][i] for i in some]]
    moving = [dot.narrow(axis + 1, 0, 1) for dot in dots[0] if not isinstance(dot, Zero)]
    if not moving:
        return aten.cat(parts, axis), ZERO
    around = list(torch.broadcast_shapes(*(dot.shape for dot in moving)))  # type: ignore[no-untyped-call]
    filled = []
    for part, dot in zip(parts, dots[0], strict=True):
        shape = [*around[: axis + 1], part.shape[axis], *around[axis + 2 :]]
        dense = part.new_zeros(()) if isinstance(dot, Zero) else dot
        filled.append(dense if list(dense.shape) == shape else dense.expand(shape))
    return aten.cat(parts, axis), torch.cat(filled, axis + 1)


@rule(aten.gather.default)
def _gather(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, axis, index = args[:3]
    draws = dots[0].shape[0]
    dot_index = index.unsqueeze(0).expand(draws, *index.shape)
    return aten.gather(x, axis, index), aten.gather(dots[0], axis_of_tangent(axis), dot_index)


_linear(pick, lambda args, dot: (args[1],))
_linear(place, lambda args, dot: (args[1], args[2]))


@rule(aten.linear.default)
def _linear_layer(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if any(not isinstance(dot, Zero) for dot in dots[1:]):
        raise MissingRuleError(
            "a linear layer's own weight carries a tangent; attach a slice to the layer instead"
        )
    return aten.linear(x, weight, bias), aten.linear(dots[0], weight)


@rule(frozen_linear)
def _frozen_linear(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, *weight, bias, accuracy_level = args
    # The same stored weight serves primal and tangents; the bias belongs to the primal only.
    return (
        frozen_linear(x, *weight, bias, accuracy_level),
        frozen_linear(dots[0], *weight, None, accuracy_level),
    )


# --- piecewise constant: the tangent stops here ----------------------------------------------------------


@rule(aten.sym_size.int)
def _size(args: Sequence[Any], _dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    return aten.sym_size.int(*args), ZERO


@rule(aten.argmax.default)
def _argmax(args: Sequence[Any], _dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    return aten.argmax(*args), ZERO


@rule(largest)
def _largest(args: Sequence[Any], _dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    return largest(*args), ZERO


# --- sums and products -----------------------------------------------------------------------------------


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def _aligned(args: Sequence[Any], dots: Sequence[Any]) -> tuple[Tangent, Tangent]:
    """Tangents of two broadcasting operands, brought to the rank of the result."""
    rank = max(_rank(args[0]), _rank(args[1]))
    first, second = (
        dot if isinstance(dot, Zero) else align(dot, _rank(value), rank)
        for value, dot in zip(args[:2], dots[:2], strict=True)
    )
    return first, second


def _widen(dot: Tangent, result: Tensor) -> Tangent:
    """Broadcast a tangent over the axes along which only the other operand was long."""
    if isinstance(dot, Zero) or dot.dim() != result.dim() + 1 or dot.shape[1:] == result.shape:
        return dot
    shape = torch.broadcast_shapes(dot.shape[1:], result.shape)  # type: ignore[no-untyped-call]
    return dot.expand(dot.shape[0], *shape)


def _scaled(dot: Tangent, factor: float) -> Tangent:
    if isinstance(dot, Zero) or factor == 1:
        return dot
    return -dot if factor == -1 else dot * factor


@rule(aten.add.Tensor)
def _add(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    y = torch.add(*args, **kwargs)
    a_dot, b_dot = _aligned(args, dots)
    return y, _widen(add_tangents(a_dot, _scaled(b_dot, kwargs.get("alpha", 1))), y)


@rule(aten.sub.Tensor)
def _sub(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    y = torch.sub(*args, **kwargs)
    a_dot, b_dot = _aligned(args, dots)
    return y, _widen(add_tangents(a_dot, _scaled(b_dot, -kwargs.get("alpha", 1))), y)


def _product(a_dot: Tangent, b: Any, multiply: Callable[[Any, Any], Tensor]) -> Tangent:
    return ZERO if isinstance(a_dot, Zero) else multiply(a_dot, b)


@rule(aten.mul.Tensor)
def _mul(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    a, b = args
    a_dot, b_dot = _aligned(args, dots)
    return a * b, add_tangents(_product(a_dot, b, torch.mul), _product(b_dot, a, torch.mul))


@rule(aten.matmul.default)
def _matmul(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    a, b = args
    if a.dim() < 2 or b.dim() < 2:
        raise MissingRuleError("a product with a vector has no rule")
    a_dot, b_dot = _aligned(args, dots)
    left = ZERO if isinstance(a_dot, Zero) else torch.matmul(a_dot, b)
    right = ZERO if isinstance(b_dot, Zero) else torch.matmul(a, b_dot)
    return torch.matmul(a, b), add_tangents(left, right)


@rule(aten.div.Tensor)
def _div(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    a, b = args
    y = a / b
    a_dot, b_dot = _aligned(args, dots)
    # (a/b)' = (a' - y b') / b
    top = add_tangents(a_dot, _product(b_dot, y, lambda dot, value: -(dot * value)))
    return y, ZERO if isinstance(top, Zero) else top / b


# --- selections: the condition is constant, each side keeps its own tangent ------------------------------


@rule(aten.where.self)
def _where(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    condition, *sides = args
    y = aten.where(condition, *sides)
    on, off = (
        0.0 if isinstance(dot, Zero) else align(dot, side.dim(), y.dim())
        for side, dot in zip(sides, dots[1:], strict=True)
    )
    return y, _widen(torch.where(condition, on, off), y)


@rule(aten.masked_fill.Scalar)
def _masked_fill(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, mask, value = args
    y = aten.masked_fill(x, mask, value)
    return y, torch.where(mask, 0.0, align(dots[0], x.dim(), y.dim()))
