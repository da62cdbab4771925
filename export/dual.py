"""Forward-mode differentiation of a captured graph: one rule per ATen operator, in one table.

A value is a pair (primal, tangent). With K directions at once, the tangent of a tensor of shape S has
shape (K, *S): a new leading axis, so every rule is the ordinary formula with one more batch axis. Where a
primal axis has length 1 the tangent's may be longer: that is how a slice shared by the batch carries one
direction per example (core (1, r, r), tangent (K, B, r, r)).

A tangent that is zero is the value ``ZERO``, never a tensor: frozen weights and everything computed
before the first trained slice add no operation to the dual program.

:class:`DualInterpreter` runs a graph on such pairs. Run under ``torch.export`` it records the dual
program; run on plain tensors it computes a jvp. An operator without a rule stops it
(:class:`MissingRuleError`): a silent wrong derivative would be worse.

The formulas are the textbook ones (Griewank & Walther, Evaluating Derivatives, 2008, ch. 3), in closed
form where that reuses primal results: softmax, LayerNorm, GELU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from edge_runtime.errors import ModelError
from export.quantise import frozen_linear

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


def _axis(axis: int) -> int:
    """An axis of the primal as an axis of its tangent."""
    return axis + 1 if axis >= 0 else axis


def _reduced(args: Sequence[Any]) -> list[int]:
    """Axes of the tangent over which a reduction runs; none named means all, but never the leading K."""
    return [_axis(axis) for axis in args[1] or range(args[0].dim())]


_linear(aten.neg.default, lambda args, dot: ())
_linear(aten.clone.default, lambda args, dot: ())
_linear(aten.permute.default, lambda args, dot: ([0, *(axis % args[0].dim() + 1 for axis in args[1])],))
_linear(aten.transpose.int, lambda args, dot: (_axis(args[1]), _axis(args[2])))
_linear(aten.unsqueeze.default, lambda args, dot: (_axis(args[1]),))
_linear(aten.squeeze.dims, lambda args, dot: ([_axis(axis) for axis in args[1]],))
_linear(aten.slice.Tensor, lambda args, dot: (_axis(args[1]), *args[2:]))
_linear(aten.sum.dim_IntList, lambda args, dot: (_reduced(args), *args[2:]))
_linear(aten.mean.dim, lambda args, dot: (_reduced(args), *args[2:]))


@rule(aten.reshape.default)
def _reshape(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = args
    # The tangent keeps its K, and a -1 in the shape keeps its meaning.
    return aten.reshape(x, shape), aten.reshape(dots[0], [dots[0].shape[0], *shape])


@rule(aten.gather.default)
def _gather(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, axis, index = args[:3]
    draws = dots[0].shape[0]
    dot_index = index.unsqueeze(0).expand(draws, *index.shape)
    return aten.gather(x, axis, index), aten.gather(dots[0], _axis(axis), dot_index)


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
    x, levels, scales, bias, accuracy_level = args
    # The same stored weight serves primal and tangents; the bias belongs to the primal only.
    return (
        frozen_linear(x, levels, scales, bias, accuracy_level),
        frozen_linear(dots[0], levels, scales, None, accuracy_level),
    )


# --- piecewise constant: the tangent stops here ----------------------------------------------------------


@rule(aten.sym_size.int)
def _size(args: Sequence[Any], _dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    return aten.sym_size.int(*args), ZERO


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


@rule(aten.relu.default)
def _relu(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x = args[0]
    return torch.relu(x), dots[0] * (x > 0).to(x.dtype)


@rule(aten.gelu.default)
def _gelu(args: Sequence[Any], dots: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x = args[0]
    if kwargs.get("approximate", "none") == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        t = torch.tanh(inner)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 0.134145 * x * x)
        return 0.5 * x * (1 + t), dots[0] * slope
    # y = x Φ(x), y' = (Φ(x) + x φ(x)) x'; the factor is computed once, on the primal row only.
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, dots[0] * (cdf + x * density)


# --- along an axis ---------------------------------------------------------------------------------------


@rule(aten.softmax.int)
def _softmax(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, axis = args[:2]
    y = torch.softmax(x, axis)
    weighted = y * dots[0]
    return y, weighted - y * weighted.sum(_axis(axis), keepdim=True)


@rule(aten.log_softmax.int)
def _log_softmax(args: Sequence[Any], dots: Sequence[Any], _: dict[str, Any]) -> tuple[Any, Any]:
    x, axis = args[:2]
    y = torch.log_softmax(x, axis)
    return y, dots[0] - (torch.exp(y) * dots[0]).sum(_axis(axis), keepdim=True)


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


class DualInterpreter(fx.Interpreter):
    """Run a graph on (primal, tangent) pairs.

    Args:
        module: a graph of ATen operators, as ``export.capture`` cuts it.
    """

    def run_dual(self, primals: Sequence[Tensor], tangents: Sequence[Tangent]) -> list[tuple[Any, Tangent]]:
        """Evaluate the graph.

        Args:
            primals: one tensor per placeholder, in order.
            tangents: for each a tensor of shape (K, *primal shape) or ZERO.

        Returns:
            For each output of the graph its value and tangent.

        Raises:
            MissingRuleError: an operator that meets a tangent has no rule.
        """
        pairs: dict[fx.Node, tuple[Any, Any]] = {}
        inputs = iter(zip(primals, tangents, strict=True))
        for node in self.graph.nodes:
            if node.op == "placeholder":
                pairs[node] = next(inputs)
            elif node.op == "call_function":
                pairs[node] = self._call(node, pairs)
            elif node.op == "output":
                return [pairs[value] for value in node.args[0]]
            else:
                raise MissingRuleError(
                    f"node {node.name} is a {node.op}; only ATen calls can be differentiated"
                )
        raise MissingRuleError("the graph has no output")

    def _call(self, node: fx.Node, pairs: dict[fx.Node, tuple[Any, Any]]) -> tuple[Any, Any]:
        args = fx.node.map_arg(node.args, lambda n: pairs[n][0])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: pairs[n][0])
        dots = [pairs[arg][1] if isinstance(arg, fx.Node) else ZERO for arg in node.args]
        nested = [n for n in node.all_input_nodes if n not in node.args and not isinstance(pairs[n][1], Zero)]
        if nested or any(not isinstance(dot, Zero) for dot in dots):
            if node.target not in RULES or nested:
                raise MissingRuleError(
                    f"no tangent rule for operator {node.target} (node {node.name}); add one to export/dual.py "
                    "with a sample in tests/export/test_dual_rules.py, or leave the layer without slices before it"
                )
            try:
                return RULES[node.target](args, dots, kwargs)
            except MissingRuleError as error:
                raise MissingRuleError(f"{error} (operator {node.target}, node {node.name})") from error
        return node.target(*args, **kwargs), ZERO  # type: ignore[operator]
