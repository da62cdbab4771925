"""The three arithmetics: against torch, against the formula, and what their programs hold."""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import ModelError
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prepare import prepare
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.training.tangents import draw_tangents
from export.lowering.arithmetic import BAND_BYTES, has_frozen_products, probe, with_arithmetic
from export.lowering.live_sets import live_sets
from export.lowering.onnx import TRANSPOSED
from export.packaging import export_package as export_package_module
from tests.export import tiny

#: Largest differences from torch of loss and jvp, relative to the largest, and least cosine of jvps. Measured on x86-64
#: over three families: row_int8 2.4e-3, 8.3e-3, 0.99996; block_int8 1.1e-3, 3.2e-3, 0.999996; float 1.6e-7, 4.7e-7, 1.
#: The bounds leave room for other CPUs, whose int8 kernels round differently.
BOUNDS: dict[Arithmetic, tuple[float, float]] = {
    "row_int8": (0.03, 0.999),
    "block_int8": (0.03, 0.999),
    "block_int4": (0.03, 0.999),
    "float": (1e-3, 0.999999),
}


def assert_close_to_torch(prepared: PreparedPackage, reference, bound: float, cosine: float) -> None:
    """One sweep of all slices on real text, beside backpropagation's loss and jvps."""
    batch = tiny.make_text_batch(prepared.package)
    specs = [spec for spec in prepared.manifest.slices if spec.kind != "head"]
    task = tiny.make_task(prepared.package, draws=3)
    tangents = draw_tangents(task, specs, 0, range(len(batch.labels)))
    slices = tiny.moved_slices(reference)
    executor = Executor(prepared, OnnxEngine(), [spec.name for spec in specs])
    got = executor.sweep(tiny.flat(slices), [batch], [tangents])
    loss, jvps = tiny.backprop_jvps(reference, slices, batch, tangents)
    assert got.jvps is not None
    found = float((got.jvps * jvps).sum() / np.linalg.norm(got.jvps) / np.linalg.norm(jvps))
    errors = tiny.relative(got.loss, loss), tiny.relative(got.jvps, jvps)
    print(f"{prepared.prepared.arithmetic}: loss {errors[0]:.1e}, jvp {errors[1]:.1e}, cosine {found:.7f}")
    assert max(errors) < bound
    assert found > cosine


@pytest.mark.parametrize("arithmetic", ["row_int8", "block_int8", "float"])
def test_each_arithmetic_agrees_with_torch(exported, prepared_in, arithmetic: Arithmetic) -> None:
    """Loss and jvps equal backpropagation's on the same stored weights, within the arithmetic's rounding."""
    assert_close_to_torch(prepared_in[arithmetic], exported.reference, *BOUNDS[arithmetic])


@pytest.mark.parametrize("arithmetic", ["row_int8", "block_int4", "float"])
def test_each_arithmetic_of_int4_agrees_with_torch(exported_int4, tmp_path, arithmetic: Arithmetic) -> None:
    """A package in int4, prepared in each arithmetic it offers: the same, on its own stored weights."""
    package = exported_int4.package
    assert package.manifest.base.quantisation == "int4"
    assert package.manifest.arithmetics == ("row_int8", "block_int4", "float")
    prepared = prepare(package, tmp_path / "prepared", OnnxEngine(), arithmetic)
    assert_close_to_torch(prepared, exported_int4.reference, *BOUNDS[arithmetic])


def test_an_unquantised_package_agrees_with_torch(exported_plain) -> None:
    """A package of LoRA slices in float32 offers float alone, as it is stored."""
    assert exported_plain.package.manifest.arithmetics == ("float",)
    prepared = PreparedPackage.as_stored(exported_plain.package)
    assert_close_to_torch(prepared, exported_plain.reference, *BOUNDS["float"])


def graph_of(package: Package, program: str, arithmetic: Arithmetic) -> onnx.GraphProto:
    path = package.path(package.manifest.programs[program].variants[arithmetic].file)
    return onnx.load(path, load_external_data=False).graph


def weight_types(package: Package, program: str, arithmetic: Arithmetic) -> Counter[str]:
    """Frozen tensors of a program by element type, whether fed or bound."""
    variant, graph = (
        package.manifest.programs[program].variants[arithmetic],
        graph_of(package, program, arithmetic),
    )
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return Counter(TensorProto.DataType.Name(types[name]) for name in (*variant.fed, *variant.bound))


@pytest.mark.parametrize("program", ["block_0.primal", "block_0.entry", "block_0.dual"])
@pytest.mark.parametrize(
    ("arithmetic", "kinds"),
    [
        # six matrices: levels and scales a row or a block; six biases; two LayerNorms; two slices: up, down
        ("row_int8", {"INT8": 6, "FLOAT": 6 + 6 + 4 + 4}),
        ("block_int8", {"UINT8": 6, "FLOAT": 6 + 6 + 4 + 4}),
        ("float", {"FLOAT": 6 + 6 + 4 + 4}),
    ],
)
def test_weights_by_element_type(
    exported, arithmetic: Arithmetic, kinds: dict[str, int], program: str
) -> None:
    """Each quantised matrix is there once, in the arithmetic's type, whatever tangents a program carries."""
    assert weight_types(exported.package, program, arithmetic) == kinds


@pytest.mark.parametrize("arithmetic", ["row_int8", "block_int8"])
def test_no_float_copy_of_a_quantised_matrix(exported, arithmetic: Arithmetic) -> None:
    """In int8 no frozen float tensor, nor any constant, is as large as a matrix, and nothing dequantises one."""
    for program, found in exported.package.manifest.programs.items():
        if arithmetic not in found.variants:  # adjoint programs have no block arithmetic
            continue
        graph = graph_of(exported.package, program, arithmetic)
        variant = exported.package.manifest.programs[program].variants[arithmetic]
        sizes = {
            value.name: int(np.prod([side.dim_value for side in value.type.tensor_type.shape.dim]))
            for value in graph.input
            if value.name in variant.fed and value.type.tensor_type.elem_type == TensorProto.FLOAT
        }
        sizes |= {
            tensor.name: int(np.prod(tensor.dims))
            for tensor in graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        }
        assert all(size < tiny.HIDDEN * tiny.HIDDEN for size in sizes.values()), program
        assert "DequantizeLinear" not in {node.op_type for node in graph.node}


@pytest.mark.parametrize("arithmetic", ["row_int8", "float"])
def test_every_weight_is_an_input(exported, arithmetic: Arithmetic) -> None:
    """Nothing is bound: one loaded program serves every block."""
    for program in exported.package.manifest.programs.values():
        assert program.variants[arithmetic].bound == ()


def test_block_int8_binds_its_matrices_alone(exported) -> None:
    """The engine repacks levels and scales of the six matrices; biases and norms are inputs there too."""
    variant = exported.package.manifest.programs["block_0.dual"].variants["block_int8"]
    assert len(variant.bound) == 12
    assert all(name.endswith(("_levels", "_scales")) for name in variant.bound)
    assert not any(name.endswith(("_levels", "_scales")) for name in variant.fed)


def test_block_int4_holds_four_bits_a_weight(exported_int4) -> None:
    """The six matrices are bound as levels, scales and zero points, two levels in a byte; no int8 copy is left."""
    manifest = exported_int4.package.manifest
    assert weight_types(exported_int4.package, "block_0.dual", "block_int4") == {
        "UINT8": 12,
        "FLOAT": 6 + 6 + 4 + 4,
    }
    variant = manifest.programs["block_0.dual"].variants["block_int4"]
    assert len(variant.bound) == 18
    weights = manifest.segments[1].weights
    levels = sum(int(np.prod(weights[name].shape)) for name in variant.bound if name.endswith("_levels"))
    hidden, inner = tiny.HIDDEN, tiny.INNER
    assert levels == (4 * hidden * hidden + 2 * hidden * inner) // 2


@pytest.mark.parametrize(
    ("program", "products", "quantised"),
    [("block_0.primal", 6, 4), ("block_0.entry", 9, 7), ("block_0.dual", 12, 8)],
)
def test_a_shared_input_is_quantised_once(exported, program: str, products: int, quantised: int) -> None:
    """Query, key and value share one quantised input, and one quantised tangent where there is one.

    A block has four inputs of frozen products: of attention, of its output, and of the two inner layers. In the entry
    program the first has no tangent.
    """
    counts = Counter(node.op_type for node in graph_of(exported.package, program, "row_int8").node)
    assert (counts["MatMulIntegerToFloat"], counts["QuantizeLinear"]) == (products, quantised)
    assert counts["MatMulNBits"] == 0


@pytest.mark.parametrize(
    ("machine", "activations"), [("x86_64", TensorProto.UINT8), ("aarch64", TensorProto.INT8)]
)
def test_int8_products_have_the_pair_of_types_that_a_machine_likes(
    exported, prepared_in, machine: str, activations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsigned activations with signed weights on x86-64, signed with signed on arm64, in every product of a program.

    Signed activations with unsigned weights, which most engine versions multiply one by one on arm64, are nowhere.
    """
    monkeypatch.setattr(platform, "machine", lambda: machine)
    manifest, prepared = exported.package.manifest, prepared_in["row_int8"]
    paths = [prepared.variant(program).file for program in manifest.programs.values()]
    pairs = Counter[tuple[int, int]]()
    for path in paths:
        graph = onnx.shape_inference.infer_shapes(
            onnx.load(exported.package.path(path), load_external_data=False)
        ).graph
        types = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info)}
        pairs.update(
            (types[n.input[0]], types[n.input[1]]) for n in graph.node if n.op_type == "MatMulIntegerToFloat"
        )
    assert set(pairs) == {(activations, TensorProto.INT8)}
    assert pairs.total() > 20


def test_the_sign_of_activations_does_not_show(
    exported, prepared_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs for arm64 give the very bits of those for x86-64: losses, logits and directional derivatives."""
    batch, prepared = tiny.make_text_batch(exported.package), prepared_in["row_int8"]
    values = tiny.flat(tiny.moved_slices(exported.reference))
    specs = [spec for spec in exported.package.manifest.slices if spec.kind != "head"]
    tangents = draw_tangents(tiny.make_task(exported.package), specs, 0, range(batch.input_ids.shape[0]))
    sweeps = []
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        sweeps.append(Executor(prepared, OnnxEngine()).sweep(values, [batch], [tangents]))
    for field in ("loss", "logits", "jvps"):
        assert getattr(sweeps[0], field).tobytes() == getattr(sweeps[1], field).tobytes(), field


def test_an_arithmetic_that_points_elsewhere_is_not_offered(
    tiny_model, exported, tmp_path, monkeypatch
) -> None:
    """One whose cosine is not above the limit leaves manifest and folder; the package still verifies and lists all."""
    checks = exported.package.manifest.self_checks
    worst = min(checks, key=lambda name: checks[name].jvp_cosine)
    assert worst != "float"
    monkeypatch.setattr(export_package_module, "COSINE_LIMIT", checks[worst].jvp_cosine)
    package = tiny.export(tiny_model, tmp_path / "out").package
    package.verify_files()
    assert package.manifest.arithmetics == tuple(name for name in checks if name != worst)
    assert set(package.manifest.self_checks) == set(package.manifest.arithmetics)
    assert not list((package.folder / "programs").glob(f"*.{worst}.onnx"))
    programs = {str(path.relative_to(package.folder)) for path in (package.folder / "programs").iterdir()}
    assert programs <= set(package.manifest.files)
    for program in package.manifest.programs.values():
        assert all(variant.file in programs for variant in program.variants.values())


def lowered(inner: int, outer: int, *, bias: bool) -> ir.Model:
    """y = x · mᵀ, and z = x · nᵀ of the same input, as the exporter lowers them."""

    def value(name: str, kind: int, *shape: object) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes, inputs = [], [value("x", TensorProto.FLOAT, "batch", "sequence", inner)]
    blocks = inner // 32
    for name, result in (("m", "y_out"), ("n", "z_out")):
        inputs.append(value(f"{name}_levels", TensorProto.UINT8, outer, blocks, 32))
        inputs.append(value(f"{name}_scales", TensorProto.FLOAT, outer, blocks))
        given_inputs = ["x", f"{name}_levels", f"{name}_scales"]
        if bias:
            inputs.append(value(f"{name}_bias", TensorProto.FLOAT, outer))
            given_inputs += ["", "", f"{name}_bias"]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                given_inputs,
                [result],
                domain="com.microsoft",
                K=inner,
                N=outer,
                bits=8,
                block_size=32,
                accuracy_level=4,
            )
        )
    outputs = [value(name, TensorProto.FLOAT, "batch", "sequence", outer) for name in ("y_out", "z_out")]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "lowered", inputs, outputs)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ir.save(model, folder / "program.onnx")
    return OnnxEngine().load(folder / "program.onnx", {}, ("y", "z")).run(feeds)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    blocks=st.integers(1, 3),
    outer=st.integers(1, 40),
    bias=st.booleans(),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_row_int8_is_its_formula(tmp_path_factory, shape, blocks, outer, bias, size, seed) -> None:
    """With s = max|x|/127 a row and q = round(x/s) + 128 the product is (q - 128)·W8 · s · w, plus the bias."""
    generator, inner = np.random.default_rng(seed), 32 * blocks
    x = (generator.standard_normal((*shape, inner)) * size).astype(np.float32)
    feeds, expected = {"x": x}, {}
    s = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / 127
    q = np.rint(x / s)
    for name, result in (("m", "y"), ("n", "z")):
        # Levels at which no CPU's kernel saturates (export/lowering/arithmetic.py).
        feeds[f"{name}_int8"] = generator.integers(-63, 64, (inner, outer), dtype=np.int8)
        feeds[f"{name}_int8_scales"] = generator.uniform(0.001, 1, outer).astype(np.float32)
        expected[result] = q @ feeds[f"{name}_int8"].astype(np.float64) * s * feeds[f"{name}_int8_scales"]
        if bias:
            feeds[f"{name}_bias"] = generator.standard_normal(outer, dtype=np.float32)
            expected[result] = expected[result] + feeds[f"{name}_bias"]
    model = with_arithmetic(lowered(inner, outer, bias=bias), "row_int8")
    got = run(model, tmp_path_factory.getbasetemp(), feeds)
    for result, wanted in expected.items():
        # A quotient next to a half may be rounded to either side: one level of one input.
        level = float(
            (s * np.abs(feeds[f"{'m' if result == 'y' else 'n'}_int8_scales"]) * 127).max(initial=0)
        )
        np.testing.assert_allclose(got[result], wanted, rtol=1e-4, atol=1.01 * level + 1e-6)


def test_float_is_the_plain_product(tmp_path) -> None:
    """Float arithmetic multiplies by the dequantised matrix and adds the bias."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 3, 64), dtype=np.float32)
    feeds = {"x": x}
    for name in ("m", "n"):
        feeds[f"{name}_float"] = generator.standard_normal((64, 5), dtype=np.float32)
        feeds[f"{name}_bias"] = generator.standard_normal(5, dtype=np.float32)
    got = run(with_arithmetic(lowered(64, 5, bias=True), "float"), tmp_path, feeds)
    np.testing.assert_allclose(got["y"], x @ feeds["m_float"] + feeds["m_bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["z"], x @ feeds["n_float"] + feeds["n_bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arithmetic", BOUNDS)
def test_the_lowered_program_is_left_as_it_is(arithmetic: Arithmetic) -> None:
    """Each arithmetic is made of a copy; a program without frozen products is the same in all."""
    model = lowered(64, 5, bias=True)
    before = ir.to_proto(model).SerializeToString()
    with_arithmetic(model, arithmetic)
    assert ir.to_proto(model).SerializeToString() == before
    assert has_frozen_products(model)
    assert not has_frozen_products(probe())


def transposed(inner: int, outer: int) -> ir.Model:
    """y = bar · m, as adjoint programs are lowered: m has ``outer`` rows of ``inner`` values."""

    def value(name: str, kind: int, *shape: object) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        value("bar", TensorProto.FLOAT, "batch", "sequence", outer),
        value("m_levels", TensorProto.UINT8, outer, inner // 32, 32),
        value("m_scales", TensorProto.FLOAT, outer, inner // 32),
    ]
    names = [each.name for each in inputs]
    node = helper.make_node(TRANSPOSED, names, ["y_out"], domain="com.microsoft", K=inner, N=outer)
    outputs = [value("y_out", TensorProto.FLOAT, "batch", "sequence", inner)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "lowered", inputs, outputs)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize("arithmetic", ["row_int8", "float"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    blocks=st.integers(1, 12),
    outer=st.sampled_from([1, 40, 4096, 9000]),
    seed=st.integers(0, 99),
)
def test_a_transposed_product_is_exact(
    tmp_path_factory, arithmetic: Arithmetic, shape, blocks, outer, seed
) -> None:
    """In float and in int8 the product with the transposed weight is that of its stored values, in one band or many."""
    generator, inner = np.random.default_rng(seed), 32 * blocks
    bar = generator.standard_normal((*shape, outer)).astype(np.float32)
    levels = generator.integers(-127, 128, (inner, outer), dtype=np.int8)
    scales = generator.uniform(0.001, 1, outer).astype(np.float32)
    matrix = levels * scales
    fed = {"m_int8": levels, "m_int8_scales": scales} if arithmetic == "row_int8" else {"m_float": matrix}
    model = with_arithmetic(transposed(inner, outer), arithmetic)
    ir.save(model, path := tmp_path_factory.getbasetemp() / "transposed.onnx")
    got = OnnxEngine().load(path, {}, ("y",)).run({"bar": bar, **fed})["y"]
    expected = bar.astype(np.float64) @ matrix.astype(np.float64).T
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_no_whole_matrix_is_held_in_float() -> None:
    """A large int8 matrix is turned into float a band at a time: the live set stays far below its float size."""
    inner, outer = 2048, 8192
    model = with_arithmetic(transposed(inner, outer), "row_int8")
    live = max(sum(term.coefficient for term in candidate) for candidate in live_sets(model))
    bands = 3 * BAND_BYTES  # a band in int8 and in float, and what the constants of the polynomial leave
    assert live - 4 * (2 * inner + 2 * outer) < bands < 4 * inner * outer / 8


def test_repacked_weights_have_no_transpose() -> None:
    """Block-wise int8 refuses a transposed product instead of writing a program that cannot run."""
    with pytest.raises(ModelError, match="block arithmetics have no adjoint"):
        with_arithmetic(transposed(64, 32), "block_int8")


def test_adjoint_programs_come_in_exact_arithmetics_only(exported) -> None:
    """They are offered in int8 by rows and in float; the package still offers block-wise int8 for forward mode."""
    manifest = exported.package.manifest
    assert "block_int8" in manifest.arithmetics
    for segment in manifest.segments[1:]:
        assert segment.adjoint is not None
        assert set(manifest.programs[segment.adjoint].variants) == {"row_int8", "float"}
    assert manifest.segments[0].adjoint is None
    for name in ("row_int8", "float"):
        check = manifest.self_checks[name]
        assert check.gradient_cosine is not None
        assert check.gradient_cosine > 0.99
