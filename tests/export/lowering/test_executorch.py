"""The same segments on ExecuTorch: what they compute, what they are planned for, and what a device gets of them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from edge_runtime.data.batches import Batch
from edge_runtime.engines.choice import engine_maker
from edge_runtime.engines.names import ENGINES
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.execution.prepare import prepare
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.package import Package
from edge_runtime.training.tangents import draw_tangents
from export.cli import read_engines, summary
from export.lowering.executorch import lower_executorch
from export.lowering.onnx import lower
from export.lowering.trace import trace
from export.lowering.write_executorch import MOST_DRAWS, bounds_for
from export.packaging import export_package as package_module
from tests.export import tiny
from tests.export.tiny import Exported

DRAWS = 3
#: Between two engines that add float32 numbers in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """A tiny BERT for both engines."""
    folder = tmp_path_factory.mktemp("engines")
    return tiny.export(tiny.write_model(folder / "model"), folder / "package", engines=ENGINES)


@pytest.fixture(scope="module")
def package(exported: Exported) -> Package:
    """Its package."""
    return exported.package


@pytest.fixture(scope="module")
def prepared(package: Package, tmp_path_factory):
    """The package as prepared for each engine, in float arithmetic."""
    folder = tmp_path_factory.mktemp("prepared")
    return {
        name: prepare(package.for_engine(name), folder / name, engine_maker(name)(1), "float")
        for name in ENGINES
    }


def sweep(prepared, exported: Exported, engine, trained: list[str], weights="resident") -> Sweep:
    """All sentences by an engine, in two micro-batches; with tangents where slices are trained."""
    manifest = exported.package.manifest
    whole = tiny.make_text_batch(exported.package)
    groups = [slice(0, 5), slice(5, 8)]
    batches = [Batch(whole.input_ids[g], whole.attention_mask[g], whole.labels[g]) for g in groups]
    task = tiny.make_task(exported.package, draws=DRAWS)
    specs = [spec for spec in manifest.slices if spec.name in trained]
    tangents = [draw_tangents(task, specs, 0, range(8)[g]) for g in groups] if trained else None
    executor = Executor(prepared[engine], engine_maker(engine)(1), trained, weights)
    return executor.sweep(tiny.flat(tiny.moved_slices(exported.reference)), batches, tangents)


def trained_from(manifest, block: int) -> list[str]:
    """The slices from a block on, so that it is the entry segment."""
    return [spec.name for spec in manifest.slices if spec.kind != "head" and spec.segment > block]


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("block", [0, 1], ids=["all blocks", "last block"])
def test_both_engines_give_the_same_losses_and_jvps(
    prepared, exported: Exported, block: int, weights
) -> None:
    """Loss, logits, residual, features and directional derivatives agree to 1e-4, resident and streamed."""
    trained = trained_from(exported.package.manifest, block)
    assert trained
    expected = sweep(prepared, exported, "onnxruntime", trained)
    got = sweep(prepared, exported, "executorch", trained, weights)
    assert got.jvps is not None
    assert expected.jvps is not None
    assert got.jvps.shape == (DRAWS, 8)
    for name in ("loss", "jvps", "logits", "residual", "features"):
        assert tiny.relative(getattr(got, name), getattr(expected, name)) < TOLERANCE, name


def test_both_engines_evaluate_alike(prepared, exported: Exported) -> None:
    """Without tangents the primal programs agree to 1e-4."""
    expected, got = (sweep(prepared, exported, name, []) for name in ENGINES)
    assert got.jvps is None
    assert tiny.relative(got.loss, expected.loss) < TOLERANCE


def test_one_prepared_layout_serves_both_engines(prepared) -> None:
    """The weight files that devices lay out for the two engines are equal, byte for byte."""
    files = prepared["executorch"].prepared.files
    assert files == prepared["onnxruntime"].prepared.files
    for name in files:
        both = {(prepared[engine].folder / name).read_bytes() for engine in ENGINES}
        assert len(both) == 1, name


def test_a_device_gets_the_programs_of_its_engine_only(package: Package) -> None:
    """Each engine's view lists its own programs and all weights; together they are the whole package."""
    seen = {name: set(package.for_engine(name).manifest.files) for name in ENGINES}
    assert not any(file.endswith(".pte") for file in seen["onnxruntime"])
    assert {file for file in seen["executorch"] if file.startswith("programs/") and ".pte" not in file} <= {
        package.manifest.probe
    }
    assert seen["onnxruntime"] | seen["executorch"] == set(package.manifest.files)
    for file in package.manifest.files:
        if not file.startswith("programs/"):
            assert file in seen["onnxruntime"] & seen["executorch"]


def test_programs_hold_no_weights(package: Package) -> None:
    """Each ExecuTorch program is smaller than the frozen matrices that it computes with."""
    manifest = package.manifest
    block = manifest.programs[manifest.segments[1].primal]
    matrices = 4 * (4 * tiny.HIDDEN**2 + 2 * tiny.HIDDEN * tiny.INNER)
    (variant,) = block.executorch.values()
    assert manifest.files[variant.file].bytes < matrices
    assert manifest.segments[1].primal == manifest.segments[2].primal  # one program for equal blocks


def test_every_program_says_what_it_was_planned_for(package: Package) -> None:
    """Planned memory, bounds, and operators that XNNPACK did not take, each with a reason."""
    for program in package.manifest.programs.values():
        (variant,) = program.executorch.values()
        assert variant.planned_bytes > 0
        assert variant.bounds == bounds_for(package.manifest.sequence_limit)
        assert variant.undelegated
        assert all(each.operator and each.reason and each.nodes for each in variant.undelegated)


def test_plans_keep_within_the_bounds(package: Package) -> None:
    """However much is asked, no choice runs more examples or draws at a time than memory was planned for."""
    manifest = package.for_engine("executorch").manifest
    slices = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
    planner, bounds = Planner(manifest, "float"), bounds_for(manifest.sequence_limit)
    for sequence in (2, 16, manifest.sequence_limit):
        ways = list(planner.choices(Work(64, sequence, 16, slices)))
        assert max(way.micro_batch for way in ways) == bounds["batch"]
        assert max(way.draws_at_a_time for way in ways) == MOST_DRAWS
    with pytest.raises(PackageError, match="ask for shorter sequences"):
        list(planner.choices(Work(1, manifest.sequence_limit + 1, 1, slices)))


def test_planned_memory_is_part_of_the_prediction(package: Package) -> None:
    """The predicted engine memory is at least what all loaded programs plan ahead, whatever the micro-batch."""
    manifest = package.for_engine("executorch").manifest
    slices = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
    planner, work = Planner(manifest, "float"), Work(8, 32, 4, slices)
    planned = planner.planned_bytes(work)
    assert planned > sum(v.planned_bytes for v in manifest.programs["head.dual"].variants.values())
    for way in planner.choices(work):
        assert planner.predict(work, way).engine_bytes >= planned
    assert Planner(package.for_engine("onnxruntime").manifest).planned_bytes(work) == 0


def test_a_package_without_programs_for_an_engine_is_refused(package: Package) -> None:
    """A device on an engine that the package was not exported for is told so, and what to do."""
    programs = {
        name: msgspec.structs.replace(program, executorch={})
        for name, program in package.manifest.programs.items()
    }
    manifest = msgspec.structs.replace(package.manifest, programs=programs)
    assert manifest.engines == ("onnxruntime",)
    with pytest.raises(
        PackageError, match="no programs for executorch, only for onnxruntime; export it with"
    ):
        manifest.for_engine("executorch")


def test_both_engines_lower_one_recording_in_any_order(exported: Exported) -> None:
    """A recorded program gives the same ExecuTorch program before and after it was lowered to ONNX."""
    stored, bounds = exported.stored, bounds_for(exported.package.manifest.sequence_limit)
    traced = trace(stored.segments[1], "entry", stored.shapes, tiny.POSITIONS)
    before = lower_executorch(traced, bounds)
    lower(traced)
    assert lower_executorch(traced, bounds) == before


def test_the_self_check_ran_on_both_engines(package: Package) -> None:
    """The manifest holds the comparison with torch for each engine, and the summary prints both."""
    (check,) = package.manifest.executorch_checks.values()
    assert check.loss < 1e-3
    assert check.jvp < 1e-3
    text = summary(package)
    assert "on ExecuTorch, float: loss" in text
    assert "MiB planned ahead; not delegated to XNNPACK:" in text


@pytest.mark.parametrize(
    ("text", "engines"),
    [("onnxruntime", ENGINES[:1]), ("executorch, onnxruntime", ENGINES), ("onnxruntime,executorch", ENGINES)],
)
def test_engines_are_read_in_any_order(text: str, engines) -> None:
    """A list with commas gives the engines in the package's order."""
    assert read_engines(text) == engines


@pytest.mark.parametrize("text", ["", "executorch", "onnxruntime,tflite"])
def test_unknown_engines_are_refused(text: str) -> None:
    """Unknown names, and a package without ONNX Runtime, are a ConfigError that lists what may be asked."""
    with pytest.raises(ConfigError, match="it may be onnxruntime, or onnxruntime,executorch"):
        read_engines(text)


def test_exporting_without_executorch_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    """Where ExecuTorch is not installed, asking for it is one line with the install command, and nothing is written."""
    installed = metadata.version

    def version(name: str) -> str:
        if name == "executorch":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    options = tiny.options(tmp_path / "model", tmp_path / "package", engines=ENGINES)
    with pytest.raises(ConfigError, match=r"pip install 'edge-runtime\[executorch\]'"):
        package_module.export_package(options, tiny.generate_key(), lambda _: None)
    assert not list(tmp_path.iterdir())
