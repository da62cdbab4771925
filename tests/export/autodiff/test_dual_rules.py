"""One sample row for each rule of the dual interpreter, compared with torch.func.jvp in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor, fx

from export.autodiff.dual import RULES, ZERO, DualInterpreter, MissingRuleError, Zero
from export.autodiff.dual_rules import LISTED
from export.model import top_activations
from export.model.top_activations import largest, place
from export.quantisation.quantise import BLOCK, dequantise, frozen_linear, quantise

aten = torch.ops.aten
LIMIT = 1e-9
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Call:
    """Arguments of one operator call; ``moving`` are positions whose tensors may carry a tangent."""

    args: tuple[Any, ...]
    moving: tuple[int, ...] = (0,)
    kwargs: dict[str, Any] = field(default_factory=dict)


def shapes(min_rank: int = 1, max_rank: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, 4), min_size=min_rank, max_size=max_rank).map(tuple)


def normal(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x < 0, x - 0.5, x + 0.5)


def either_sign(draw: Draw, axis: int, rank: int) -> int:
    """The same axis counted from the front or from the back."""
    return axis if draw(st.booleans()) else axis - rank


def one_axis(draw: Draw, rank: int) -> int:
    return draw(st.integers(-rank, rank - 1))


def several_axes(draw: Draw, candidates: list[int], rank: int) -> list[int]:
    chosen = draw(st.lists(st.sampled_from(candidates), min_size=1, unique=True))
    return [either_sign(draw, axis, rank) for axis in chosen]


def unary(draw: Draw) -> Call:
    return Call((normal(draw, draw(shapes(0))),))


def positive(draw: Draw) -> Call:
    return Call((normal(draw, draw(shapes(0))).abs() + 0.5,))


def binary(draw: Draw) -> Call:
    chosen = draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=3)).input_shapes
    if draw(st.integers(0, 4)) == 0:
        return Call((normal(draw, chosen[0]), draw(st.sampled_from([2, -1.5]))))
    return Call((normal(draw, chosen[0]), away_from_zero(normal(draw, chosen[1]))), (0, 1))


def sum_or_difference(draw: Draw) -> Call:
    call = binary(draw)
    kwargs = {"alpha": draw(st.sampled_from([2, -0.5]))} if draw(st.booleans()) else {}
    return Call(call.args, call.moving, kwargs)


def matmul(draw: Draw) -> Call:
    strategy = mutually_broadcastable_shapes(signature="(m,n),(n,p)->(m,p)", max_dims=2, max_side=3)
    left, right = draw(strategy).input_shapes
    return Call((normal(draw, left), normal(draw, right)), (0, 1))


def linear(draw: Draw) -> Call:
    shape = draw(shapes(1, 3))
    out = draw(st.integers(1, 4))
    bias = draw(st.sampled_from([(), (None,), (normal(draw, (out,)),)]))
    return Call((normal(draw, shape), normal(draw, (out, shape[-1])), *bias))


def frozen(draw: Draw) -> Call:
    lead, out = draw(shapes(1, 2)), draw(st.integers(BLOCK, BLOCK + 3))
    parts = quantise(
        normal(draw, (out, 4 * BLOCK)).float(), "linear", draw(st.sampled_from(["int8", "int4"]))
    )
    weight = (parts["levels"], parts["scales"], parts.get("zero_points"))
    bias = draw(st.sampled_from([None, normal(draw, (out,))]))
    return Call((normal(draw, (*lead, 4 * BLOCK)), *weight, bias, draw(st.sampled_from([1, 4]))))


def permute(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    order = draw(st.permutations(range(x.dim())))
    return Call((x, [either_sign(draw, axis, x.dim()) for axis in order]))


def transpose(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    return Call((x, one_axis(draw, x.dim()), one_axis(draw, x.dim())))


def unsqueeze(draw: Draw) -> Call:
    x = normal(draw, draw(shapes(0)))
    return Call((x, draw(st.integers(-x.dim() - 1, x.dim()))))


def squeeze(draw: Draw) -> Call:
    shape = list(draw(shapes(0, 3)))
    shape.insert(draw(st.integers(0, len(shape))), 1)
    return Call((normal(draw, tuple(shape)), several_axes(draw, list(range(len(shape))), len(shape))))


def cut(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    axis = one_axis(draw, x.dim())
    start = draw(st.integers(0, x.shape[axis] - 1))
    return Call((x, axis, start, draw(st.integers(start + 1, 9)), draw(st.integers(1, 2))))


def reduction(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    every = draw(st.integers(0, 5)) == 0
    axes = [] if every else several_axes(draw, list(range(x.dim())), x.dim())
    return Call((x, axes, draw(st.booleans())))


def reshape(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    sides = [*x.shape[:-2], x.shape[-2:].numel(), 1]
    sides = draw(st.permutations(sides))
    if draw(st.booleans()):
        sides[draw(st.integers(0, len(sides) - 1))] = -1
    return Call((x, sides))


def gather(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    axis = one_axis(draw, x.dim())
    shape = list(x.shape)
    shape[axis] = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return Call((x, axis, torch.randint(x.shape[axis], tuple(shape), generator=generator)))


def along_axis(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    return Call((x, one_axis(draw, x.dim())))


def last_axis(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    return Call((x, [either_sign(draw, x.dim() - 1, x.dim())], draw(st.booleans())))


def gelu(draw: Draw) -> Call:
    kwargs = draw(st.sampled_from([{}, {"approximate": "none"}, {"approximate": "tanh"}]))
    return Call((normal(draw, draw(shapes())),), kwargs=kwargs)


def layer_norm(draw: Draw) -> Call:
    x = normal(draw, (*draw(shapes(1, 2)), 3, 4)) * 2
    normalised = draw(st.sampled_from([[4], [3, 4]]))
    weight, bias = normal(draw, tuple(normalised)), normal(draw, tuple(normalised))
    rest = draw(st.sampled_from([(), (None, None), (weight, None), (weight, bias), (weight, bias, 1e-2)]))
    return Call((x, normalised, *rest))


def size(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    return Call((x, one_axis(draw, x.dim())))


def view(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    return Call((x, [-1, *x.shape[1:], 1]))


def expand(draw: Draw) -> Call:
    shape = draw(shapes(1, 3))
    wide = [draw(st.integers(1, 3)) if side == 1 else draw(st.sampled_from([side, -1])) for side in shape]
    return Call((normal(draw, shape), [*draw(st.sampled_from([(), (2,), (1, 3)])), *wide]))


def concatenation(draw: Draw) -> Call:
    shape = draw(shapes())
    axis = draw(st.integers(0, len(shape) - 1))
    sides = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    parts = [normal(draw, (*shape[:axis], side, *shape[axis + 1 :])) for side in sides]
    moving = tuple(i for i, side in enumerate(sides) if side)
    return Call((*parts, either_sign(draw, axis, len(shape))), moving)


def pick(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    axis = one_axis(draw, x.dim())
    return Call((x, axis, draw(st.integers(-x.shape[axis], x.shape[axis] - 1))))


def power(draw: Draw) -> Call:
    return Call((normal(draw, draw(shapes(0))).abs() + 0.5, draw(st.sampled_from([0, 1, 2, 3, -1, 0.5]))))


def selection(draw: Draw) -> Call:
    chosen = draw(mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3)).input_shapes
    condition = normal(draw, chosen[0]) > 0
    return Call((condition, normal(draw, chosen[1]), normal(draw, chosen[2])), (1, 2))


def masked(draw: Draw) -> Call:
    chosen = draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3)).input_shapes
    return Call((normal(draw, chosen[0]), normal(draw, chosen[1]) > 0, draw(st.sampled_from([0, -1e4]))))


def rms_norm(draw: Draw) -> Call:
    x = normal(draw, (*draw(shapes(1, 2)), 3, 4)) * 2
    normalised = draw(st.sampled_from([[4], [3, 4]]))
    weight = normal(draw, tuple(normalised))
    return Call((x, normalised, *draw(st.sampled_from([(), (None, 1e-6), (weight,), (weight, 1e-2)]))))


def chosen_places(draw: Draw) -> tuple[Tensor, Tensor]:
    """Entries (..., F), and the places (..., k) of some of each row."""
    x = normal(draw, (*draw(shapes(1, 2)), draw(st.integers(2, 5))))
    return x, largest(x, draw(st.integers(1, x.shape[-1])))


def the_largest(draw: Draw) -> Call:
    return Call((normal(draw, (2, 5)), draw(st.integers(1, 5))))


def picked(draw: Draw) -> Call:
    return Call(chosen_places(draw))


def placed(draw: Draw) -> Call:
    x, index = chosen_places(draw)
    return Call((top_activations.pick(x, index), index, x.shape[-1] + draw(st.integers(0, 2))))


#: Operator to a function that draws a call of it. Every rule has a row here.
def index_select(draw: Draw) -> Call:
    x = normal(draw, draw(shapes()))
    axis = one_axis(draw, x.dim())
    chosen = draw(st.lists(st.integers(0, x.shape[axis] - 1), min_size=1, max_size=5))
    return Call((x, axis, torch.tensor(chosen, dtype=draw(st.sampled_from([torch.int32, torch.int64])))))


SAMPLES: dict[Any, Callable[[Draw], Call]] = {
    aten.neg.default: unary,
    aten.clone.default: unary,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dims: squeeze,
    aten.slice.Tensor: cut,
    aten.sum.dim_IntList: reduction,
    aten.mean.dim: reduction,
    aten._to_copy.default: unary,
    aten.select.int: pick,
    aten.expand.default: expand,
    aten.cat.default: concatenation,
    aten.where.self: selection,
    aten.masked_fill.Scalar: masked,
    aten.pow.Tensor_Scalar: power,
    aten.sigmoid.default: unary,
    aten.silu.default: unary,
    aten.rms_norm.default: rms_norm,
    aten.view.default: view,
    aten.reshape.default: reshape,
    aten.gather.default: gather,
    largest: the_largest,
    top_activations.pick: picked,
    place: placed,
    aten.index_select.default: index_select,
    aten.linear.default: linear,
    frozen_linear: frozen,
    aten.sym_size.int: size,
    aten.add.Tensor: sum_or_difference,
    aten.sub.Tensor: sum_or_difference,
    aten.mul.Tensor: binary,
    aten.matmul.default: matmul,
    aten.div.Tensor: binary,
    aten.exp.default: unary,
    aten.rsqrt.default: positive,
    aten.tanh.default: unary,
    aten.relu.default: unary,
    aten.gelu.default: gelu,
    aten.softmax.int: along_axis,
    aten.log_softmax.int: along_axis,
    aten.logsumexp.default: last_axis,
    aten.argmax.default: along_axis,
    aten.layer_norm.default: layer_norm,
}
#: What torch cannot differentiate forwards itself, or takes its tensors as a list, written with flat arguments.
REFERENCES: dict[Any, Callable[..., Tensor]] = {
    aten.cat.default: lambda *args: aten.cat(list(args[:-1]), args[-1]),
    frozen_linear: lambda x, levels, scales, zero_points, bias, _: aten.linear(
        x, dequantise(levels, scales, zero_points).double(), bias
    ),
    top_activations.pick: lambda x, index: x.gather(-1, index.long()),
    place: lambda kept, index, width: kept.new_zeros((*kept.shape[:-1], width)).scatter(
        -1, index.long(), kept
    ),
}


def run_rule(operator: Any, call: Call, dots: dict[int, Tensor]) -> tuple[Any, Any]:
    """One operator through the interpreter, its tensors as inputs of the graph."""
    graph = fx.Graph()
    args, primals, tangents = [], [], []
    for position, arg in enumerate(call.args):
        if isinstance(arg, Tensor):
            args.append(graph.placeholder(f"x{position}"))
            primals.append(arg)
            tangents.append(dots.get(position, ZERO))
        else:
            args.append(arg)
    if operator in LISTED:
        args = [args[:-1], args[-1]]
    graph.output((graph.call_function(operator, tuple(args), call.kwargs),))
    return DualInterpreter(fx.GraphModule(torch.nn.Module(), graph)).run_dual(primals, tangents)[0]


def expected_jvp(operator: Any, call: Call, dots: dict[int, Tensor], draw: int) -> Tensor:
    positions = sorted(dots)
    function = REFERENCES.get(operator, operator)

    def of_moving(*moving: Tensor) -> Tensor:
        args = list(call.args)
        for position, value in zip(positions, moving, strict=True):
            args[position] = value
        return function(*args, **call.kwargs)

    primals = tuple(call.args[position] for position in positions)
    return torch.func.jvp(of_moving, primals, tuple(dots[position][draw] for position in positions))[1]


def test_every_rule_has_a_sample() -> None:
    """The rules and the samples have the same operators, so no rule goes untested."""
    assert set(RULES) == set(SAMPLES)


@pytest.mark.parametrize("operator", SAMPLES, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), draws=st.sampled_from([1, 3]))
def test_a_rule_equals_torchs_jvp(operator: Any, data: st.DataObject, draws: int) -> None:
    """Value and tangent of a rule equal torch's, for random shapes, axes and choices of what moves."""
    call = SAMPLES[operator](data.draw)
    moving = data.draw(st.lists(st.sampled_from(call.moving), min_size=1, unique=True))
    dots = {position: normal(data.draw, (draws, *call.args[position].shape)) for position in moving}
    value, tangent = run_rule(operator, call, dots)
    exact = REFERENCES.get(operator, operator)(*call.args, **call.kwargs)
    if not isinstance(exact, Tensor) or not exact.is_floating_point():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(exact))
        assert tangent is ZERO
        return
    expected = torch.stack([expected_jvp(operator, call, dots, draw) for draw in range(draws)])
    assert tangent.shape == expected.shape
    # An expected tangent may be exactly zero (softmax over one entry): then only rounding is left.
    for got, wanted in ((value, exact), (tangent, expected)):
        assert (got - wanted).abs().max() <= LIMIT * wanted.abs().max() + 1e-13


@pytest.mark.parametrize("operator", SAMPLES, ids=str)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_without_tangents_the_result_has_none(operator: Any, data: st.DataObject) -> None:
    """An operator that meets no tangent runs as it is, and its result carries none."""
    call = SAMPLES[operator](data.draw)
    assert run_rule(operator, call, {})[1] is ZERO


CHAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "core": lambda x, core: aten.matmul(x, aten.transpose(core, -1, -2)),
    "scaled": lambda x, core: aten.mul(aten.matmul(x, aten.neg(aten.permute(core, [0, 2, 1]))), 0.5),
    "added": lambda x, core: aten.matmul(x, aten.add(core, aten.mul(core, core))),
    "shifted": lambda x, core: aten.tanh(aten.sub(aten.matmul(x, core), x)),
}


@pytest.mark.parametrize("chain", CHAINS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    data=st.data(),
    draws=st.sampled_from([1, 3]),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 3),
    rank=st.integers(1, 4),
)
def test_a_slice_moves_each_example_its_own_way(
    chain: str, data: st.DataObject, draws: int, batch: int, tokens: int, rank: int
) -> None:
    """A slice tensor (1, r, r) with tangent (K, B, r, r) gives the jvp of each example along its own direction."""
    function = CHAINS[chain]
    x, core = normal(data.draw, (batch, tokens, rank)), normal(data.draw, (1, rank, rank))
    dots = normal(data.draw, (draws, batch, rank, rank))
    graph = fx.symbolic_trace(_Traced(function)).graph
    pairs = DualInterpreter(fx.GraphModule(torch.nn.Module(), _default_overloads(graph))).run_dual(
        [x, core], [ZERO, dots]
    )
    tangent = pairs[0][1]
    expected = torch.stack(
        [
            torch.cat(
                [
                    torch.func.jvp(lambda c, i=i: function(x[i : i + 1], c), (core,), (dots[k, i][None],))[1]
                    for i in range(batch)
                ]
            )
            for k in range(draws)
        ]
    )
    assert tangent.shape == expected.shape
    assert (tangent - expected).abs().max() <= LIMIT * expected.abs().max() + 1e-13


class _Traced(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, core: Tensor) -> tuple[Tensor]:
        return (self.function(x, core),)


OVERLOADS = {
    aten.matmul: aten.matmul.default,
    aten.transpose: aten.transpose.int,
    aten.permute: aten.permute.default,
    aten.neg: aten.neg.default,
    aten.tanh: aten.tanh.default,
    aten.mul: aten.mul.Tensor,
    aten.add: aten.add.Tensor,
    aten.sub: aten.sub.Tensor,
}


def _default_overloads(graph: fx.Graph) -> fx.Graph:
    """Name overloads as torch.export does."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = OVERLOADS[node.target]
    return graph


def missing(operator: Any, *shapes_: tuple[int, ...], moving: int = 0) -> MissingRuleError:
    """The error of an operator whose argument ``moving`` carries a tangent."""
    args = tuple(torch.ones(shape, dtype=torch.float64) for shape in shapes_)
    dots = {moving: torch.ones((1, *shapes_[moving]), dtype=torch.float64)}
    with pytest.raises(MissingRuleError) as caught:
        run_rule(operator, Call(args), dots)
    return caught.value


def test_a_missing_rule_names_operator_and_node() -> None:
    """An operator without a rule that meets a tangent stops the run, named with its node."""
    message = str(missing(aten.sin.default, (2,)))
    assert "aten.sin.default" in message
    assert "node sin_default" in message
    assert "name --targets that lie behind it in the last block" in message


def test_an_operator_without_a_rule_may_run_before_any_slice() -> None:
    """What no tangent reaches needs no rule."""
    x = torch.ones(2, dtype=torch.float64)
    value, tangent = run_rule(aten.sin.default, Call((x,)), {})
    assert torch.equal(value, torch.sin(x))
    assert isinstance(tangent, Zero)


def test_a_tangent_inside_a_list_is_not_lost() -> None:
    """A tensor in a list that its operator's rule does not read stops the run, and its tangent is not lost."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.stack.default, ([x, x],)),))
    interpreter = DualInterpreter(fx.GraphModule(torch.nn.Module(), graph))
    with pytest.raises(MissingRuleError, match=r"aten\.stack"):
        interpreter.run_dual([torch.ones(2)], [torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("operator", "shapes_", "moving"),
    [
        (aten.linear.default, ((2, 3), (4, 3)), 1),
        (aten.linear.default, ((2, 3), (4, 3), (4,)), 2),
        (aten.matmul.default, ((3,), (3, 4)), 0),
        (aten.matmul.default, ((2, 3), (3,)), 1),
    ],
    ids=["linear weight", "linear bias", "vector times matrix", "matrix times vector"],
)
def test_a_form_no_rule_covers_is_named(
    operator: Any, shapes_: tuple[tuple[int, ...], ...], moving: int
) -> None:
    """A known operator used in a way its rule does not cover stops the run, named with its node."""
    message = str(missing(operator, *shapes_, moving=moving))
    assert str(operator) in message
    assert "node" in message


def test_a_moving_layer_norm_weight_is_named() -> None:
    """LayerNorm's own weight may not carry a tangent."""
    call = Call((torch.randn(2, 4).double(), [4], torch.ones(4).double()))
    with pytest.raises(MissingRuleError, match="LayerNorm"):
        run_rule(aten.layer_norm.default, call, {2: torch.ones(1, 4).double()})


def test_a_moving_rms_norm_weight_is_named() -> None:
    """RMSNorm's own weight may not carry a tangent."""
    call = Call((torch.randn(2, 4).double(), [4], torch.ones(4).double()))
    with pytest.raises(MissingRuleError, match="RMSNorm"):
        run_rule(aten.rms_norm.default, call, {2: torch.ones(1, 4).double()})


@pytest.mark.parametrize("operator", [aten.softmax.int, aten.log_softmax.int], ids=str)
def test_a_softmax_gives_the_type_it_is_asked_for(operator: Any) -> None:
    """With a dtype argument, value and tangent are computed and given in that type."""
    x, dot = torch.randn(3, 4), torch.randn(2, 3, 4)
    value, tangent = run_rule(operator, Call((x, -1, torch.float64)), {0: dot})
    exact = operator(x.double(), -1)
    expected = torch.stack(
        [torch.func.jvp(lambda v: operator(v, -1), (x.double(),), (d.double(),))[1] for d in dot]
    )
    assert value.dtype == tangent.dtype == torch.float64
    torch.testing.assert_close(value, exact, rtol=LIMIT, atol=1e-13)
    torch.testing.assert_close(tangent, expected, rtol=LIMIT, atol=1e-13)


def test_a_slice_that_is_expanded_keeps_its_examples_apart() -> None:
    """A side of 1 that an expansion leaves alone may be longer in the tangent."""
    core, dot = torch.randn(1, 2, 1).double(), torch.randn(3, 5, 2, 1).double()
    value, tangent = run_rule(aten.expand.default, Call((core, [1, 2, 4])), {0: dot})
    assert value.shape == (1, 2, 4)
    assert torch.equal(tangent, dot.expand(3, 5, 2, 4))


def test_slices_that_are_joined_keep_their_examples_apart() -> None:
    """Joined parts may have tangents with and without an axis of examples, or none at all."""
    parts = tuple(torch.randn(1, 2).double() for _ in range(3))
    dots = {0: torch.randn(3, 5, 2).double(), 1: torch.randn(3, 1, 2).double()}
    _, tangent = run_rule(aten.cat.default, Call((*parts, 1)), dots)
    expected = torch.cat([dots[0], dots[1].expand(3, 5, 2), torch.zeros(3, 5, 2).double()], 2)
    assert torch.equal(tangent, expected)


def test_a_reshape_keeps_the_examples_of_a_tangent_apart() -> None:
    """Where examples share a value (1, ...), its tangent has one of each, and keeps them apart in a reshape."""
    call, dot = Call((torch.randn(1, 4, 6), [-1, 4, 2, 3])), torch.randn(2, 5, 4, 6)
    value, tangent = run_rule(aten.reshape.default, call, {0: dot})
    assert value.shape == (1, 4, 2, 3)
    assert torch.equal(tangent, dot.reshape(2, 5, 4, 2, 3))


def test_a_reshape_that_would_mix_examples_is_refused() -> None:
    """Joining the axis of examples to another cannot be said of a value that has no examples, and stops."""
    for shape in ([-1, 6], [4, 6], [4, 6, -1]):
        with pytest.raises(MissingRuleError, match="tangent differs by example"):
            run_rule(aten.reshape.default, Call((torch.randn(1, 4, 6), shape)), {0: torch.randn(2, 5, 4, 6)})


def test_parts_without_entries_carry_no_tangent() -> None:
    """A join of which only an empty part moves does not move."""
    call = Call((torch.randn(0), torch.randn(3), 0), (0,))
    value, tangent = run_rule(aten.cat.default, call, {0: torch.randn(2, 0)})
    assert torch.equal(value, call.args[1])
    assert tangent is ZERO
