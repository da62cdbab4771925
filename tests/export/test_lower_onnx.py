"""The written programs in ONNX Runtime, against torch on the same stored weights and real text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_runtime.data import Batch
from edge_runtime.engines.onnx import OnnxEngine
from edge_runtime.executor import Executor, Sweep
from edge_runtime.package import Package
from edge_runtime.tangents import draw_tangents
from tests.export import tiny

#: Relative difference allowed between ONNX Runtime and torch with float activations.
LIMIT = 1e-3


def run(package: Package, reference, batch: Batch, draws: int, trained: list[str] | None = None):
    """One sweep of all trained slices, and what torch's backpropagation gives for it."""
    specs = [spec for spec in package.manifest.slices if spec.kind != "head"]
    specs = [spec for spec in specs if trained is None or spec.name in trained]
    task = tiny.make_task(package, draws=draws)
    tangents = draw_tangents(task, specs, 0, range(len(batch.labels)))
    slices = tiny.moved_slices(reference)
    executor = Executor(package, OnnxEngine(), [spec.name for spec in specs])
    got = executor.sweep(tiny.flat(slices), [batch], [tangents])
    return got, tiny.backprop_jvps(reference, slices, batch, tangents)


def assert_equal_to_torch(got: Sweep, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert tiny.relative(got.loss, expected[0]) < LIMIT
    assert got.jvps is not None
    assert got.jvps.shape == expected[1].shape
    assert tiny.relative(got.jvps, expected[1]) < LIMIT


@pytest.fixture(params=["lora_xs int8", "lora float32"])
def exact(request) -> tuple[Package, object]:
    """A package that computes with float activations, and its reference."""
    if request.param == "lora float32":
        exported = request.getfixturevalue("exported_plain")
        return exported.package, exported.reference
    return request.getfixturevalue("float_package"), request.getfixturevalue("exported").reference


def test_loss_and_jvp_equal_torch_on_real_text(exact) -> None:
    """With float activations loss and jvps equal backpropagation's (measured: loss 2e-7, jvp 6e-7)."""
    package, reference = exact
    assert_equal_to_torch(*run(package, reference, tiny.make_text_batch(package), 3))


def test_int8_arithmetic_adds_a_bounded_rounding(exported) -> None:
    """As shipped, int8 activations move loss and jvps by under 3 % and keep their direction.

    Measured on this model: loss 1.0e-3, jvp 2.1e-3, cosine 0.999998. The bounds leave room for other CPUs,
    whose int8 kernels round differently.
    """
    got, (loss, jvps) = run(exported.package, exported.reference, tiny.make_text_batch(exported.package), 3)
    assert got.jvps is not None
    errors = tiny.relative(got.loss, loss), tiny.relative(got.jvps, jvps)
    cosine = float((got.jvps * jvps).sum() / np.linalg.norm(got.jvps) / np.linalg.norm(jvps))
    assert max(errors) < 0.03
    assert cosine > 0.999


def test_the_self_check_in_the_manifest_is_honest(exported) -> None:
    """The manifest's differences lie within the exporter's limits, and int8 costs more than float does."""
    check = exported.package.manifest.self_check
    assert check.rows == len(tiny.CHECK_TEXTS)
    assert max(check.strict_loss, check.strict_jvp) < LIMIT
    assert check.strict_jvp < check.jvp < 0.1
    assert check.jvp_cosine > 0.99


@pytest.mark.parametrize(
    ("rows", "draws", "tokens"), [(1, 1, 2), (1, 4, 3), (5, 1, 32), (7, 3, 9), (2, 64, 5)]
)
def test_batch_sequence_and_draws_are_dynamic(exact, rows: int, draws: int, tokens: int) -> None:
    """The same programs run at every size, smallest ones included, and stay equal to torch."""
    package, reference = exact
    generator = np.random.default_rng(rows)
    mask = np.ones((rows, tokens), dtype=np.int64)
    mask[0, max(tokens // 2, 1) :] = 0
    ids = generator.integers(5, 60, (rows, tokens))
    batch = Batch(ids, mask, np.arange(rows) % len(tiny.LABELS))
    assert_equal_to_torch(*run(package, reference, batch, draws))


def test_padding_changes_nothing(exact) -> None:
    """An example's loss and jvps do not depend on how far it is padded."""
    package, reference = exact
    short = tiny.make_text_batch(package, tiny.SENTENCES[5:6])
    long = tiny.make_text_batch(package, (tiny.SENTENCES[5], tiny.SENTENCES[6]))
    alone, padded = run(package, reference, short, 2)[0], run(package, reference, long, 2)[0]
    np.testing.assert_allclose(padded.loss[:1], alone.loss, rtol=1e-5)
    np.testing.assert_allclose(padded.jvps[:, :1], alone.jvps, rtol=1e-4, atol=1e-6)


def test_a_slice_of_the_last_block_alone_equals_torch(exact) -> None:
    """The entry program of a later block gives the same jvps as torch."""
    package, reference = exact
    last = [spec.name for spec in package.manifest.slices if ".1." in spec.name][-1:]
    assert_equal_to_torch(*run(package, reference, tiny.make_text_batch(package), 2, last))


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def programs(package: Package) -> dict[str, onnx.GraphProto]:
    return {
        name: graph_of(package.folder / program.file) for name, program in package.manifest.programs.items()
    }


def external(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    return [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def test_no_frozen_matrix_stays_float(exported) -> None:
    """In an int8 package the only float matrices are the slices' SVD factors; scales are 1 to 32 levels."""
    for name, graph in programs(exported.package).items():
        tensors = {t.name: t for t in external(graph)}
        matrices = {
            n for n, t in tensors.items() if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1
        }
        scales = {n for n in matrices if n.endswith("_scales")}
        for each in scales:
            levels = tensors[each.removesuffix("_scales") + "_levels"]
            assert levels.data_type == onnx.TensorProto.UINT8
            assert np.prod(levels.dims) == 32 * np.prod(tensors[each].dims)
        assert all(n.endswith(("_up", "_down")) for n in matrices - scales), (name, matrices)


@pytest.mark.parametrize(
    ("program", "kinds"),
    [
        # word, position and type tables: levels, scales; LayerNorm: weight, bias; ids of types and positions
        ("embedding.primal", {"UINT8": 3, "FLOAT": 5}),
        # six matrices: levels, scales, bias; two LayerNorms: weight, bias; two slices: up, down
        ("block_0.primal", {"UINT8": 6, "FLOAT": 20}),
        ("block_0.entry", {"UINT8": 6, "FLOAT": 20}),
        ("block_0.dual", {"UINT8": 6, "FLOAT": 20}),
        ("head.primal", {}),
        ("head.dual", {}),
    ],
)
def test_weights_by_element_type(exported, program: str, kinds: dict[str, int]) -> None:
    """Each program names exactly its quantised matrices, scales, biases and factors as external tensors."""
    graph = programs(exported.package)[program]
    counted = Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in external(graph))
    counted.pop("INT64", None)
    assert counted == kinds


def test_no_weight_lies_inside_a_program(exported, exported_plain) -> None:
    """Everything stored in a program file itself is a few constants; weights are external and the file small."""
    for package in (exported.package, exported_plain.package):
        for program in package.manifest.programs.values():
            path = package.folder / program.file
            graph = graph_of(path)
            inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
            inside += [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
            assert sum(len(t.SerializeToString()) for t in inside) < 4096, program.file
            assert {t.name for t in external(graph)} == set(program.weights)
            assert path.stat().st_size < 128 << 10


def test_programs_name_nothing_of_the_exporting_machine(exported) -> None:
    """A program carries no source path and no Python stack of the machine that made it."""
    for program in exported.package.manifest.programs.values():
        data = (exported.package.folder / program.file).read_bytes()
        for trace in (b"site-packages", str(Path(tiny.__file__).parents[2]).encode(), b".py"):
            assert trace not in data, (program.file, trace)


def test_a_tangent_costs_the_products_it_passes_and_no_more(exported) -> None:
    """Primal, entry and dual of a block use 6, 9 and 12 quantised products.

    The block has six frozen matrices. In the entry program the incoming hidden state has no tangent: query,
    key and value take none through their frozen matrices; the three products after attention do.
    """
    counts = {
        name.split(".")[1]: sum(node.op_type == "MatMulNBits" for node in graph.node)
        for name, graph in programs(exported.package).items()
        if name.startswith("block_0")
    }
    assert counts == {"primal": 6, "entry": 9, "dual": 12}


def test_a_program_without_tangents_has_none(exported) -> None:
    """Primal programs neither take nor give a tangent, and are the smallest of their block."""
    manifest = exported.package.manifest
    sizes = {name: len(graph.node) for name, graph in programs(exported.package).items()}
    assert sizes["block_0.primal"] < sizes["block_0.entry"] < sizes["block_0.dual"]
    for name in ("embedding.primal", "block_0.primal", "head.primal"):
        assert not [
            n for n in (*manifest.programs[name].inputs, *manifest.programs[name].outputs) if "_dot" in n
        ]
    assert "hidden_dot" not in manifest.programs["block_0.entry"].inputs
    assert "hidden_dot" in manifest.programs["block_0.dual"].inputs


def test_axes_are_called_by_what_they_are(exported) -> None:
    """The inputs' dynamic axes are called draws, batch and sequence, and no others are dynamic."""
    for name, graph in programs(exported.package).items():
        for value in graph.input:
            names = [d.dim_param for d in value.type.tensor_type.shape.dim if d.dim_param]
            assert set(names) <= {"draws", "batch", "sequence"}, (name, value.name, names)
            assert ("draws" in names) == value.name.endswith("_dot")


def test_the_engine_accepts_programs_only_with_their_weights(exported) -> None:
    """A program file alone is not enough to run: its weights really lie outside."""
    path = exported.package.path("programs/block_0.primal.onnx")
    with pytest.raises(Exception, match=r"external|bound-by-the-runtime"):
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
