"""Live sets of small hand-written graphs, against sums worked out by hand."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from export.lowering.live_sets import evaluate, live_sets, node_memory

#: (batch, sequence, draws)
SIZE = (2, 3, 5)
#: Bytes of a float tensor (batch, sequence, 4) at SIZE.
UNIT = 2 * 3 * 4 * 4
Line = tuple[str, str, tuple[str, ...]]


def graph(*lines: Line, outputs: tuple[str, ...] = ("y",), shape: object = ("batch", "sequence", 4)):
    """A model from lines (result, operator, operands); ``x`` is the input, ``w`` an initialiser."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    values = {"x": ir.Value(name="x", shape=ir.Shape(shape), type=float32)}
    weight = ir.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=ir.DataType.FLOAT, name="w")
    values["w"] = ir.Value(name="w", shape=ir.Shape((1, 4)), type=float32, const_value=weight)
    nodes = []
    for result, operator, operands in lines:
        given = [values[name] for name in operands]
        made = values["w"] if result == "constant" else None
        values[result] = ir.Value(
            name=result, shape=ir.Shape(made.shape if made else shape), type=ir.TensorType(ir.DataType.FLOAT)
        )
        nodes.append(ir.Node("", operator, given, outputs=[values[result]]))
    made_graph = ir.Graph(
        [values["x"]],
        [values[name] for name in outputs],
        nodes=nodes,
        initializers=[values["w"]],
        opset_imports={"": 20},
    )
    return ir.Model(made_graph, ir_version=10)


def peak(model: ir.Model) -> float:
    """Largest live set at SIZE, in units of one tensor."""
    batch, sequence, draws = SIZE
    return (
        max(
            sum(
                term.coefficient
                * batch**term.batch_power
                * sequence**term.sequence_power
                * draws**term.draws_power
                for term in candidate
            )
            for candidate in live_sets(model)
        )
        / UNIT
    )


CASES: dict[str, tuple[tuple[Line, ...], float]] = {
    "an output alone": ((("y", "Neg", ("x",)),), 1),
    "a step needs its input and its result": ((("a", "Neg", ("x",)), ("y", "Neg", ("a",))), 2),
    "a reshaped tensor is the same memory": (
        (("a", "Neg", ("x",)), ("b", "Reshape", ("a", "w")), ("y", "Neg", ("b",))),
        2,
    ),
    "a reshaped tensor keeps its source alive": (
        (
            ("a", "Neg", ("x",)),
            ("b", "Reshape", ("a", "w")),
            ("c", "Neg", ("x",)),
            ("d", "Add", ("b", "c")),
            ("y", "Neg", ("d",)),
        ),
        3,
    ),
    "softmax overwrites what dies with it": ((("a", "Neg", ("x",)), ("y", "Softmax", ("a",))), 1),
    "softmax overwrites nothing that is read later": (
        (("a", "Neg", ("x",)), ("b", "Softmax", ("a",)), ("y", "Add", ("a", "b"))),
        3,
    ),
    "softmax never overwrites the caller's input": ((("y", "Softmax", ("x",)),), 1),
    "a reshaped tensor may be overwritten": (
        (("a", "Neg", ("x",)), ("b", "Reshape", ("a", "w")), ("y", "Softmax", ("b",))),
        1,
    ),
    "entries are put into the row that dies with it": (
        (("a", "Neg", ("x",)), ("y", "ScatterElements", ("a", "w", "w"))),
        1,
    ),
    "what depends on weights alone is folded at load": (
        (("constant", "Transpose", ("w",)), ("y", "Mul", ("x", "constant"))),
        1,
    ),
    "a selection computes both sides": ((("a", "Neg", ("x",)), ("y", "Where", ("a", "a", "a"))), 4),
    "a quantised product packs its rows": ((("y", "MatMulNBits", ("x", "w")),), 1 + 1.25 / 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_small_graph(case: str) -> None:
    """The largest live set is the sum worked out by hand."""
    lines, expected = CASES[case]
    assert peak(graph(*lines)) == expected


def test_outputs_live_to_the_end() -> None:
    """An output made early is still counted while later nodes run."""
    lines = (("y", "Neg", ("x",)), ("a", "Neg", ("x",)), ("z", "Neg", ("a",)))
    assert peak(graph(*lines, outputs=("y", "z"))) == 3


def test_sizes_are_monomials_of_the_dynamic_axes() -> None:
    """A tensor over draws, batch and two sequence axes has one term with those powers."""
    model = graph(("y", "Neg", ("x",)), shape=("draws", "batch", "sequence", "sequence", 2))
    ((term,),) = live_sets(model)
    assert (term.coefficient, term.batch_power, term.sequence_power, term.draws_power) == (8, 1, 2, 1)


def test_a_flattened_axis_counts_all_its_factors() -> None:
    """An axis named as a product of axes and numbers is as long as their product."""
    model = graph(("y", "Neg", ("x",)), shape=("draws*batch*2*sequence", 3))
    ((term,),) = live_sets(model)
    assert (term.coefficient, term.batch_power, term.sequence_power, term.draws_power) == (24, 1, 1, 1)


def test_the_larger_of_two_polynomials_depends_on_the_size() -> None:
    """Of two live sets that grow differently both are kept, and one that never wins is dropped."""
    model = graph(("a", "Neg", ("x",)), ("b", "Neg", ("a",)), ("y", "Neg", ("b",)))
    for name, shape in (("a", (100,)), ("b", ("batch", 1)), ("y", ("batch", "batch"))):
        value = next(node.outputs[0] for node in model.graph if node.outputs[0].name == name)
        value.shape = ir.Shape(shape)
    kept = {tuple(term.batch_power for term in candidate) for candidate in live_sets(model)}
    assert kept == {(0, 1), (1, 2)}


def test_a_value_without_a_shape_is_named() -> None:
    """A lowered value of unknown shape stops the prediction."""
    model = graph(("a", "Neg", ("x",)), ("y", "Neg", ("a",)))
    next(iter(model.graph)).outputs[0].shape = None
    with pytest.raises(ValueError, match="value a"):
        node_memory(model)


def test_a_polynomial_at_a_size() -> None:
    """Powers are of batch, sequence and draws, in that order."""
    assert evaluate({(1, 2, 0): 4.0, (0, 0, 1): 1.0}, *SIZE) == 4 * 2 * 9 + 5
