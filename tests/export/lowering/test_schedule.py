"""The node order, against exhaustive search on small random graphs."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.lowering.live_sets import live_sets
from export.lowering.schedule import REFERENCE, order_for_memory

#: Wide enough that the search keeps every set of nodes.
EVERYTHING = 10**6
OPERATORS = ("Add", "Add", "Add", "Softmax", "Reshape", "Where")


def random_model(data: st.DataObject, most: int) -> ir.Model:
    """A random graph: each node reads earlier values; sizes grow with draws or not."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape((1,)), type=float32)
    values, nodes = [x], []
    for index in range(data.draw(st.integers(1, most))):
        operator = data.draw(st.sampled_from(OPERATORS))
        count = 1 if operator in ("Softmax", "Reshape") else data.draw(st.integers(1, 3))
        inputs = [values[data.draw(st.integers(0, len(values) - 1))] for _ in range(count)]
        same = operator in ("Softmax", "Reshape") and inputs[0] is not x
        drawn = data.draw(
            st.tuples(st.sampled_from(["draws", "batch", "sequence"]), st.integers(1, 5).map(lambda n: n * 8))
        )
        made = ir.Value(name=f"v{index}", shape=inputs[0].shape if same else ir.Shape(drawn), type=float32)
        nodes.append(ir.Node("", operator, inputs, outputs=[made], name=f"n{index}"))
        values.append(made)
    unread = [value for value in values[1:] if not value.uses()]
    extra = data.draw(st.lists(st.sampled_from(values[1:]), max_size=2, unique=True))
    outputs = list(dict.fromkeys([*unread[: data.draw(st.integers(0, len(unread)))], *extra]))
    return ir.Model(ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 20}), ir_version=10)


def peaks(model: ir.Model) -> tuple[float, ...]:
    """Largest live sets at the reference sizes, as the manifest will state them."""
    return tuple(
        max(
            (
                sum(
                    term.coefficient * b**term.batch_power * s**term.sequence_power * k**term.draws_power
                    for term in candidate
                )
                for candidate in live_sets(model)
            ),
            default=0.0,
        )
        for b, s, k in REFERENCE
    )


def is_topological(model: ir.Model) -> bool:
    seen = set(model.graph.inputs) | set(model.graph.initializers.values())
    for node in model.graph:
        if any(value is not None and value not in seen for value in node.inputs):
            return False
        seen.update(node.outputs)
    return True


def every_order(model: ir.Model) -> list[tuple[float, ...]]:
    """Peaks of all topological orders."""
    found = []
    for nodes in itertools.permutations(list(model.graph)):
        trial = model.clone()
        by_name = {node.name: node for node in trial.graph}
        trial.graph.remove(list(trial.graph))
        trial.graph.extend(by_name[node.name] for node in nodes)
        if is_topological(trial):
            found.append(peaks(trial))
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), beam=st.sampled_from([1, 4, 48]))
def test_the_new_order_is_valid_and_never_worse(data: st.DataObject, beam: int) -> None:
    """Every node comes after what it reads, none is lost, and the worse relative peak has not grown."""
    model = random_model(data, 24)
    names, before = {node.name for node in model.graph}, peaks(model)
    changed = order_for_memory(model, beam)
    after = peaks(model)
    assert is_topological(model)
    assert {node.name for node in model.graph} == names
    if not changed:
        assert after == before
    else:
        assert any(new < old for new, old in zip(after, before, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_wide_search_is_exact(data: st.DataObject) -> None:
    """With room for every set of nodes, no topological order does better."""
    model = random_model(data, 6)
    everything = every_order(model)
    best = [min(column) for column in zip(*everything, strict=True)]

    def cost(found: tuple[float, ...]) -> float:
        return max((f / b for f, b in zip(found, best, strict=True) if b), default=0.0)

    order_for_memory(model, EVERYTHING)
    assert cost(peaks(model)) == pytest.approx(min(map(cost, everything)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_default_search_is_near_the_exact_one(data: st.DataObject) -> None:
    """On graphs of a dozen nodes the default beam finds a peak within a tenth of the exact one."""
    model = random_model(data, 12)
    exact = model.clone()
    order_for_memory(model)
    order_for_memory(exact, EVERYTHING)
    assert max(np.divide(peaks(model), np.maximum(peaks(exact), 1))) <= 1.1


def test_the_same_graph_gets_the_same_order_twice() -> None:
    """An ordered graph is left as it is."""
    model = two_chains()
    assert order_for_memory(model)
    order = [node.name for node in model.graph]
    assert not order_for_memory(model)
    assert [node.name for node in model.graph] == order


def two_chains() -> ir.Model:
    """Two chains that each widen and narrow again, interleaved as badly as can be."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape((1,)), type=float32)
    nodes, ends = [], [x, x]
    for step, width in enumerate((100, 100, 1)):
        for chain in range(2):
            made = ir.Value(name=f"v{step}{chain}", shape=ir.Shape((width, "sequence")), type=float32)
            nodes.append(ir.Node("", "Add", [ends[chain]], outputs=[made], name=f"n{step}{chain}"))
            ends[chain] = made
    return ir.Model(ir.Graph([x], ends, nodes=nodes, opset_imports={"": 20}), ir_version=10)


def test_chains_run_one_after_another() -> None:
    """Of two wide chains that end narrow, the second starts when the first has ended."""
    model = two_chains()
    before = peaks(model)
    assert order_for_memory(model)
    assert before == (400 * 128 * 4 - 100 * 128 * 4,) * 2
    assert peaks(model) == (201 * 128 * 4,) * 2


def test_a_graph_inside_a_node_is_refused() -> None:
    """Branches and loops read values that no input names, so their order is not touched."""
    model = two_chains()
    inner = ir.Graph([], [], nodes=[], name="inner")
    first = next(iter(model.graph))
    first.attributes["body"] = ir.AttrGraph("body", inner)
    with pytest.raises(ValueError, match="graphs inside"):
        order_for_memory(model)
