"""The written programs in ONNX Runtime, against torch on the same stored weights and real text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edge_runtime.data.batches import Batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.package.manifest import Arithmetic, Program, Variant
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.training.tangents import draw_tangents
from export.lowering.onnx import lower
from export.lowering.trace import TracedProgram, trace
from tests.export import tiny

#: Relative difference allowed between ONNX Runtime and torch with float activations.
LIMIT = 1e-3


def run(prepared: PreparedPackage, reference, batch: Batch, draws: int, trained: list[str] | None = None):
    """One sweep of all trained slices, and what torch's backpropagation gives for it."""
    specs = [spec for spec in prepared.manifest.slices if spec.kind != "head"]
    specs = [spec for spec in specs if trained is None or spec.name in trained]
    task = tiny.make_task(prepared.package, draws=draws)
    tangents = draw_tangents(task, specs, 0, range(len(batch.labels)))
    slices = tiny.moved_slices(reference)
    executor = Executor(prepared, OnnxEngine(), [spec.name for spec in specs])
    got = executor.sweep(tiny.flat(slices), [batch], [tangents])
    return got, tiny.backprop_jvps(reference, slices, batch, tangents)


def assert_equal_to_torch(got: Sweep, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert tiny.relative(got.loss, expected[0]) < LIMIT
    assert got.jvps is not None
    assert got.jvps.shape == expected[1].shape
    assert tiny.relative(got.jvps, expected[1]) < LIMIT


@pytest.fixture(params=["lora_xs int8", "lora float32"])
def exact(request) -> tuple[PreparedPackage, object]:
    """A package that computes with float activations, and its reference."""
    if request.param == "lora float32":
        exported = request.getfixturevalue("exported_plain")
        return PreparedPackage.as_stored(exported.package), exported.reference
    return request.getfixturevalue("float_prepared"), request.getfixturevalue("exported").reference


def test_loss_and_jvp_equal_torch_on_real_text(exact) -> None:
    """With float activations loss and jvps equal backpropagation's (measured: loss 2e-7, jvp 6e-7)."""
    prepared, reference = exact
    assert_equal_to_torch(*run(prepared, reference, tiny.make_text_batch(prepared.package), 3))


def test_the_self_check_in_the_manifest_is_honest(exported) -> None:
    """The manifest's differences lie within the exporter's limits, and int8 costs more than float does."""
    checks = exported.package.manifest.self_checks
    assert set(checks) == set(exported.package.manifest.arithmetics)
    strict = checks.pop("float")
    assert max(strict.loss, strict.jvp) < LIMIT
    for check in checks.values():
        assert check.rows == strict.rows == len(tiny.CHECK_TEXTS)
        assert strict.jvp < check.jvp < 0.1
        assert check.jvp_cosine > 0.99


@pytest.mark.parametrize(
    ("rows", "draws", "tokens"), [(1, 1, 2), (1, 4, 3), (5, 1, 32), (7, 3, 9), (2, 64, 5)]
)
def test_batch_sequence_and_draws_are_dynamic(exact, rows: int, draws: int, tokens: int) -> None:
    """The same programs run at every size, smallest ones included, and stay equal to torch."""
    prepared, reference = exact
    generator = np.random.default_rng(rows)
    mask = np.ones((rows, tokens), dtype=np.int64)
    mask[0, max(tokens // 2, 1) :] = 0
    ids = generator.integers(5, 60, (rows, tokens))
    batch = Batch(ids, mask, np.arange(rows) % len(tiny.LABELS))
    assert_equal_to_torch(*run(prepared, reference, batch, draws))


def test_padding_changes_nothing(exact) -> None:
    """An example's loss and jvps do not depend on how far it is padded."""
    prepared, reference = exact
    short = tiny.make_text_batch(prepared.package, tiny.SENTENCES[5:6])
    long = tiny.make_text_batch(prepared.package, (tiny.SENTENCES[5], tiny.SENTENCES[6]))
    alone, padded = run(prepared, reference, short, 2)[0], run(prepared, reference, long, 2)[0]
    np.testing.assert_allclose(padded.loss[:1], alone.loss, rtol=1e-5)
    np.testing.assert_allclose(padded.jvps[:, :1], alone.jvps, rtol=1e-4, atol=1e-6)


def test_a_slice_of_the_last_block_alone_equals_torch(exact) -> None:
    """The entry program of a later block gives the same jvps as torch."""
    prepared, reference = exact
    last = [spec.name for spec in prepared.manifest.slices if ".1." in spec.name][-1:]
    assert_equal_to_torch(*run(prepared, reference, tiny.make_text_batch(prepared.package), 2, last))


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def programs(package: Package, arithmetic: Arithmetic = "block_int8") -> dict[str, onnx.GraphProto]:
    """Graphs by program name; in ``block_int8``, which adjoint programs lack, each frozen product is one node."""
    return {
        name: graph_of(package.folder / program.variants[arithmetic].file)
        for name, program in package.manifest.programs.items()
        if arithmetic in program.variants
    }


def weights(graph: onnx.GraphProto, program: Program, arithmetic: Arithmetic) -> dict[str, int]:
    """Element type of each frozen tensor that a program names, as input or as external tensor."""
    fed = {v.name: v.type.tensor_type.elem_type for v in graph.input if v.name not in program.inputs}
    bound = {t.name: t.data_type for t in external(graph)}
    assert set(fed) == set(program.variants[arithmetic].fed)
    assert set(bound) == set(program.variants[arithmetic].bound)
    return {**fed, **bound}


def external(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    return [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


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
    """Each program names exactly its quantised matrices, scales, biases and factors."""
    graph, spec = programs(exported.package)[program], exported.package.manifest.programs[program]
    counted = Counter(onnx.TensorProto.DataType.Name(t) for t in weights(graph, spec, "block_int8").values())
    counted.pop("INT64", None)
    assert counted == kinds


def variants(package: Package) -> list[tuple[Program, Arithmetic, Variant]]:
    return [(p, name, v) for p in package.manifest.programs.values() for name, v in p.variants.items()]


def test_no_weight_lies_inside_a_program(exported, exported_plain) -> None:
    """Everything stored in a program file itself is a few constants; weights come from outside, the file is small."""
    for package in (exported.package, exported_plain.package):
        for program, arithmetic, variant in variants(package):
            path = package.folder / variant.file
            graph = graph_of(path)
            inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
            inside += [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
            assert sum(len(t.SerializeToString()) for t in inside) < 4096, variant.file
            assert weights(graph, program, arithmetic) or variant.file.startswith("programs/head")
            assert path.stat().st_size < 192 << 10


def test_programs_name_nothing_of_the_exporting_machine(exported) -> None:
    """A program carries no source path and no Python stack of the machine that made it."""
    for _, _, variant in variants(exported.package):
        data = (exported.package.folder / variant.file).read_bytes()
        for leak in (b"site-packages", str(Path(tiny.__file__).parents[2]).encode(), b".py"):
            assert leak not in data, (variant.file, leak)


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
    for name, graph in programs(exported.package, "row_int8").items():
        for value in graph.input:
            names = [d.dim_param for d in value.type.tensor_type.shape.dim if d.dim_param]
            assert set(names) <= {"draws", "batch", "sequence"}, (name, value.name, names)
            assert ("draws" in names) == value.name.endswith("_dot")


def test_lowering_leaves_the_recorded_program_as_it_is(exported) -> None:
    """The graph is rewritten on a copy: a recorded program stays unchanged, and lowers to the same model again."""
    segment = exported.stored.segments[1]
    traced = trace(segment, "dual", exported.stored.shapes, tiny.POSITIONS)
    recorded = str(traced.exported.graph)
    first, again = (ir.to_proto(lower(traced)).SerializeToString() for _ in range(2))
    assert str(traced.exported.graph) == recorded
    assert first == again


def test_the_engine_accepts_programs_only_with_their_weights(exported) -> None:
    """A program file with bound weights is not enough to run: they really lie outside."""
    path = exported.package.path("programs/block_0.primal.block_int8.onnx")
    with pytest.raises(Exception, match=r"external|bound-by-the-runtime"):
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_what_has_no_translation_is_taken_apart_and_casts_are_explicit(tmp_path: Path) -> None:
    """A program with an operator that must be taken apart, and one with a product of two types, give torch's values."""

    class TakenApart(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.special.entr(x)]

    class Cast(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [(x > 0.5).to(torch.int64) * x]

    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    for module in (TakenApart(), Cast()):
        sides = ({0: torch.export.Dim("batch", min=1, max=64)},)
        exported = torch.export.export(module, (x,), dynamic_shapes=sides)
        lowered = lower(TracedProgram(exported, ("x",), ("y",), (), {"x": {0: "batch"}}))
        ir.save(lowered, tmp_path / "program.onnx")
        (got,) = ort.InferenceSession(tmp_path / "program.onnx").run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, module(x)[0].numpy(), rtol=1e-6)
