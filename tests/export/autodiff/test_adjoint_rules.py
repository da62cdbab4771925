"""Every adjoint rule, compared with torch.autograd in float64 on the samples of the tangent rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from export.autodiff.adjoint import AdjointInterpreter
from export.autodiff.adjoint_rules import ADJOINT_RULES, CONSTANT
from export.autodiff.dual import RULES, MissingRuleError
from export.autodiff.dual_rules import LISTED
from tests.export.autodiff.test_dual_rules import LIMIT, REFERENCES, SAMPLES, Call, normal

aten = torch.ops.aten


def graph_of(operator: Any, call: Call) -> tuple[fx.GraphModule, list[Tensor], list[int]]:
    """One operator as a graph, its tensors as inputs; their values and their positions in the call."""
    graph, args, primals, positions = fx.Graph(), [], [], []
    for position, arg in enumerate(call.args):
        if isinstance(arg, Tensor):
            args.append(graph.placeholder(f"x{position}"))
            primals.append(arg)
            positions.append(position)
        else:
            args.append(arg)
    if operator in LISTED:
        args = [args[:-1], args[-1]]
    graph.output((graph.call_function(operator, tuple(args), call.kwargs),))
    return fx.GraphModule(torch.nn.Module(), graph), primals, positions


def test_every_differentiable_operator_has_an_adjoint() -> None:
    """Whatever has a tangent rule has an adjoint rule too, and the other way round."""
    assert set(ADJOINT_RULES) == set(RULES) - CONSTANT


@pytest.mark.parametrize("operator", ADJOINT_RULES, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_rule_equals_torchs_gradient(operator: Any, data: st.DataObject) -> None:
    """Value and cotangents of a rule equal autograd's, for random shapes, axes and choices of what is wanted."""
    call = SAMPLES[operator](data.draw)
    assume(operator is not aten.slice.Tensor or call.args[-1] == 1)  # steps are refused
    wanted = data.draw(st.lists(st.sampled_from(call.moving), min_size=1, unique=True))
    module, primals, positions = graph_of(operator, call)
    function = REFERENCES.get(operator, operator)
    leaves = {p: call.args[p].clone().requires_grad_() for p in sorted(wanted)}
    exact = function(*(leaves.get(p, arg) for p, arg in enumerate(call.args)), **call.kwargs)
    seed = normal(data.draw, tuple(exact.shape))
    expected = torch.autograd.grad(exact, list(leaves.values()), seed)
    (value,), bars = AdjointInterpreter(module).run_adjoint(
        primals, [position in leaves for position in positions], {0: seed}
    )
    for got, right in zip((value, *bars), (exact.detach(), *expected), strict=True):
        assert got.shape == right.shape
        # An expected cotangent may be exactly zero (softmax over one entry): then only rounding is left.
        assert got.numel() == 0 or (got - right).abs().max() <= LIMIT * right.abs().max() + 1e-13


class _Chain(torch.nn.Module):
    """A reduction whose cotangent stays narrow, then operators that need it wide."""

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor]:
        pooled = torch.mean(torch.tanh(x + shift) * x, [1], keepdim=True)
        return (torch.permute(torch.exp(pooled) + x, [0, 2, 1]),)


def test_narrow_cotangents_are_widened_where_that_matters() -> None:
    """A chain of reductions and broadcasts gives autograd's gradients, though cotangents stay unexpanded inside."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(_Chain(), (x.detach(), shift.detach())).run_decompositions({})
    (expected,) = _Chain()(x, shift)
    gradients = torch.autograd.grad(expected.sum(), [x, shift])
    outputs, bars = AdjointInterpreter(fx.GraphModule(torch.nn.Module(), exported.graph)).run_adjoint(
        [x.detach(), shift.detach()], [True, True], {0: None}
    )
    torch.testing.assert_close(outputs[0], expected.detach(), rtol=1e-12, atol=1e-12)
    for got, right in zip(bars, gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def _one_call(operator: Any, *args: Tensor, wanted: int = 0, extra: tuple[Any, ...] = ()) -> MissingRuleError:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(args))]
    graph.output((graph.call_function(operator, (*nodes, *extra)),))
    interpreter = AdjointInterpreter(fx.GraphModule(torch.nn.Module(), graph))
    with pytest.raises(MissingRuleError) as caught:
        interpreter.run_adjoint(list(args), [i == wanted for i in range(len(args))], {0: None})
    return caught.value


def test_a_missing_rule_names_operator_and_node() -> None:
    """An operator without an adjoint stops the export and is named with its node."""
    error = _one_call(aten.sort.default, torch.randn(3))
    assert "aten.sort.default" in str(error)
    assert "node sort" in str(error)


@pytest.mark.parametrize(
    ("operator", "args", "extra"),
    [
        (aten.linear.default, (torch.randn(2, 3), torch.randn(4, 3)), ()),
        (aten.matmul.default, (torch.randn(3), torch.randn(3, 2)), ()),
        (aten.slice.Tensor, (torch.randn(2, 6),), (1, 0, 6, 2)),
    ],
    ids=("linear", "vector", "steps"),
)
def test_a_form_no_rule_covers_is_named(operator: Any, args: tuple[Tensor, ...], extra: Any) -> None:
    """A trained weight, a product with a vector and a slice with steps are refused with the operator's name."""
    error = _one_call(operator, *args, wanted=len(args) - 1, extra=extra)
    assert str(operator) in str(error)


def test_a_wanted_input_without_influence_is_named() -> None:
    """Asking for the gradient of what the result does not depend on is an error, not a zero."""
    graph = fx.Graph()
    x, _ = graph.placeholder("x"), graph.placeholder("idle")
    graph.output((graph.call_function(aten.exp.default, (x,)),))
    interpreter = AdjointInterpreter(fx.GraphModule(torch.nn.Module(), graph))
    with pytest.raises(MissingRuleError, match="idle"):
        interpreter.run_adjoint([torch.ones(2), torch.ones(2)], [True, True], {0: None})
