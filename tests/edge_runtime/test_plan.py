"""Predicted memory: the live sets against an independent verifier, and the choice of a micro-batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from onnx import TensorProto, helper

from edge_runtime.executor import Executor
from edge_runtime.package import Program, Segment, SizeTerm
from edge_runtime.plan import (
    largest_micro_batch,
    live_bytes,
    predict_peak,
    preferred_micro_batch,
    program_name,
)
from edge_runtime.weights import MappedWeights
from tests.edge_runtime.packages import make_manifest

MIB = 1 << 20
ALIASES = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")


def program_with(*live: tuple[SizeTerm, ...]) -> Program:
    return Program("programs/block.onnx", (), (), (), live)


def test_a_live_set_is_the_largest_polynomial_at_a_size() -> None:
    """Which polynomial is largest depends on the size: 128·B·T against 96·B·T + 64·K·B."""
    program = program_with((SizeTerm(128, 1, 1),), (SizeTerm(96, 1, 1), SizeTerm(64, 1, 0, 1)))
    assert live_bytes(program, 1, 1, 1) == 160
    assert live_bytes(program, 1, 10, 1) == 1280
    assert live_bytes(program, 3, 10, 8) == 3 * (960 + 512)
    assert live_bytes(program_with(), 1, 1, 1) == 0


def test_live_sets_of_a_graph_worked_by_hand() -> None:
    """Lifetimes of a five-node graph, its reshape sharing its input's memory.

    x (B, T, 8) is the caller's. a = Relu(x): 32BT bytes. b = Reshape(a): none, but keeps a alive.
    c = MatMul(a, w): a + c = 32BT + 64BT. d = Relu(b): a + c + d = 128BT, and a dies.
    e = MatMul(k, v): c, d outputs and e (K, B, 16): 96BT + 64KB.
    """
    import onnx_ir as ir

    from export.predict import live_sets

    def value(name: str, *shape: object) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Reshape", ["a", "shape"], ["b"]),
            helper.make_node("MatMul", ["a", "w"], ["c"]),
            helper.make_node("Relu", ["b"], ["d"]),
            helper.make_node("MatMul", ["k", "v"], ["e"]),
        ],
        "hand",
        [
            value("x", "batch", "sequence", 8),
            value("k", "draws", "batch", 4),
            value("w", 8, 16),
            value("v", 4, 16),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [4]),
        ],
        [
            value("c", "batch", "sequence", 16),
            value("d", "batch", "sequence", 2, 4),
            value("e", "draws", "batch", 16),
        ],
        value_info=[value("a", "batch", "sequence", 8), value("b", "batch", "sequence", 2, 4)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    terms = {
        tuple(sorted((t.batch_power, t.sequence_power, t.draws_power, t.coefficient) for t in live))
        for live in live_sets(ir.from_proto(model))
    }
    assert terms == {((1, 1, 0, 128.0),), ((1, 0, 1, 64.0), (1, 1, 0, 96.0))}


def measured_sizes(
    path: Path, weights: dict[str, np.ndarray], sizes: dict[str, int]
) -> tuple[onnx.GraphProto, dict[str, int]]:
    """Bytes of every value of a graph, by running it with every value as an output and nothing fused."""
    model = onnx.load(path, load_external_data=False)
    given = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in given:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    bound = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), bound)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for each in session.get_inputs():
        shape = [side if isinstance(side, int) else sizes[side] for side in each.shape]
        dtype = np.int64 if "int64" in each.type else bool if "bool" in each.type else np.float32
        feeds[each.name] = np.ones(shape, dtype=dtype)
    names = [output.name for output in session.get_outputs()]
    results = session.run(names, feeds)
    return model.graph, {name: np.asarray(array).nbytes for name, array in zip(names, results, strict=True)}


def largest_live_set(graph: onnx.GraphProto, nbytes: dict[str, int], outputs: set[str]) -> int:
    """The definition, read literally: at each node, the sum over storages that exist and will still be needed.

    A storage is made by the first node of a chain of aliases. It is needed at a node if the node or any later
    one reads any name of the chain, or if a name of the chain is an output.
    """
    storage: dict[str, str] = {}
    made: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if node.op_type in ALIASES:
                storage[name] = storage.get(node.input[0], node.input[0])
            else:
                storage[name] = name
                made[name] = number
    peak = 0
    for number in range(len(graph.node)):
        needed = {storage.get(name) for node in graph.node[number:] for name in node.input}
        needed |= {storage[name] for name in outputs if name in storage}
        live = [name for name, at in made.items() if at <= number and name in needed]
        peak = max(peak, sum(nbytes[name] for name in live))
    return peak


@pytest.mark.parametrize(("batch", "sequence", "draws"), [(1, 2, 1), (3, 7, 2), (1, 32, 4), (8, 5, 16)])
def test_an_independent_verifier_finds_the_predicted_live_sets(
    exported, batch: int, sequence: int, draws: int
) -> None:
    """Lifetimes recomputed from measured sizes of every intermediate value give the predicted bytes.

    The verifier shares no code with the planner: sizes come from running the graph, lifetimes from the
    definition.
    """
    sizes = {"batch": batch, "sequence": sequence, "draws": draws}
    package = exported.package
    segments = {name: s for s in package.manifest.segments for name in (s.primal, s.entry, s.dual) if name}
    for name, program in package.manifest.programs.items():
        arrays = MappedWeights(package, segments[name]).arrays
        weights = {each: arrays[each] for each in program.weights}
        graph, nbytes = measured_sizes(package.path(program.file), weights, sizes)
        exact = largest_live_set(graph, nbytes, {f"{output}_out" for output in program.outputs})
        predicted = live_bytes(program, batch, sequence, draws)
        assert predicted == exact, name


@pytest.mark.parametrize("first", [None, 1, 2])
def test_the_plan_names_the_programs_that_run(exported, first: int | None) -> None:
    """Planner and executor choose the same program for each segment."""
    from edge_runtime.engines.onnx import OnnxEngine

    names = {
        1: ["encoder.layer.0.attention.self.query"],
        2: ["encoder.layer.1.attention.self.value"],
        None: [],
    }
    executor = Executor(exported.package, OnnxEngine(), names[first])
    assert executor.first_dual == first
    manifest = exported.package.manifest
    planned = [
        manifest.programs[program_name(segment, index, first)]
        for index, segment in enumerate(manifest.segments)
    ]
    assert planned == [stage.program for stage in executor._stages]


def test_a_segment_without_dual_falls_back_to_primal() -> None:
    """A segment that has no program with tangents is planned with its primal one."""
    segment = Segment("s", "p", None, None, {})
    assert program_name(segment, 3, 1) == "p"


BIG = replace(
    make_manifest(),
    programs={
        "block": replace(
            make_manifest().programs["block"],
            live=((SizeTerm(4096.0, 1, 1), SizeTerm(4096.0, 1, 1, 1)), (SizeTerm(64.0, 1, 2),)),
        )
    },
)
WORK = st.fixed_dictionaries(
    {
        "first_segment": st.sampled_from([None, 0, 1]),
        "batch_size": st.integers(1, 64),
        "sequence": st.integers(1, 512),
        "draws": st.integers(1, 64),
        "floor_bytes": st.sampled_from([0, 40 * MIB, 90 * MIB]),
    }
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(work=WORK, caps=st.tuples(st.integers(0, 1024), st.integers(0, 1024)))
def test_a_larger_cap_never_means_a_smaller_micro_batch(work: dict, caps: tuple[int, int]) -> None:
    """The micro-batch grows with the cap, and its prediction fits the cap unless it is one example already."""
    chosen = []
    for cap in sorted(caps):
        micro_batch, prediction = largest_micro_batch(BIG, cap * MIB, **work)
        assert 1 <= micro_batch <= preferred_micro_batch(work["batch_size"], work["sequence"])
        assert prediction == predict_peak(BIG, micro_batch=micro_batch, **work)
        assert prediction.total_bytes <= cap * MIB or micro_batch == 1
        chosen.append(micro_batch)
    assert chosen[0] <= chosen[1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(work=WORK, field=st.sampled_from(["batch_size", "sequence", "draws", "micro_batch"]))
def test_more_work_never_takes_less(work: dict, field: str) -> None:
    """The prediction grows with batch, sequence, draws and micro-batch; its parts add up."""
    base = {**work, "micro_batch": 2}
    less, more = predict_peak(BIG, **base), predict_peak(BIG, **{**base, field: base[field] + 1})
    assert less.total_bytes <= more.total_bytes
    assert less.total_bytes == sum(getattr(less, name) for name in less.__dataclass_fields__)


def test_the_device_own_floor_replaces_the_constant() -> None:
    """A measured floor moves the prediction by exactly its difference."""
    work = {"first_segment": 0, "batch_size": 4, "micro_batch": 4, "sequence": 16, "draws": 2}
    low, high = (predict_peak(BIG, floor_bytes=floor * MIB, **work) for floor in (40, 90))
    assert high.total_bytes - low.total_bytes == 50 * MIB


def test_tangents_are_counted_only_where_they_run() -> None:
    """Evaluation takes no more for many draws; training does."""
    work = {"batch_size": 4, "micro_batch": 4, "sequence": 16}
    for first, grows in ((None, False), (0, True)):
        few, many = (predict_peak(BIG, first_segment=first, draws=k, **work).waiting_bytes for k in (1, 9))
        assert (many > few) == grows
