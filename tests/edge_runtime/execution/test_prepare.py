"""Preparing a package for this machine: layouts, the choice of an arithmetic, and when a folder is not used."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.engines.choice import engine_version
from edge_runtime.engines.engine import Array, LoadedProgram
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import DeviceError, PackageError, PreparationError
from edge_runtime.execution import layout
from edge_runtime.execution import prepare as prepare_module
from edge_runtime.execution.calibration import CALIBRATION_ROWS, CALIBRATION_TOKENS, weight_limit
from edge_runtime.execution.layout import lay_out
from edge_runtime.execution.prepare import prepare
from edge_runtime.execution.weights import MappedWeights
from edge_runtime.memory.plan import USABLE_SHARE, ExecutionChoice, Planner, Work
from edge_runtime.package import prepared
from edge_runtime.package.manifest import ARITHMETICS, Arithmetic, TensorRef
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PREPARED, Calibration, Prepared, PreparedPackage, is_current
from tests.edge_runtime.packages import FILES, make_manifest

VERSION = engine_version("onnxruntime")


def package_of(
    folder: Path, levels: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None = None
) -> Package:
    """A package whose first segment is one quantised matrix ``m`` and a bias ``b``."""
    (folder / "weights").mkdir(parents=True)
    bias = np.array([7, 8], np.float32)
    padding = bytes(-levels.size % 64)
    zeros = b"" if zero_points is None else zero_points.tobytes()
    data = b"".join([levels.tobytes(), padding, scales.tobytes(), bias.tobytes(), zeros])
    (folder / "weights" / "block.bin").write_bytes(data)
    file, start = "weights/block.bin", levels.size + len(padding)
    weights = {
        "m_levels": TensorRef(file, 0, "uint8", levels.shape),
        "m_scales": TensorRef(file, start, "float32", scales.shape),
        "b": TensorRef(file, start + scales.nbytes, "float32", (2,)),
    }
    if zero_points is not None:
        end = start + scales.nbytes + bias.nbytes
        weights["m_zero_points"] = TensorRef(file, end, "uint8", zero_points.shape)
    manifest = make_manifest({**FILES, file: data})
    segment = replace(manifest.segments[0], weights=weights)
    return Package(folder, replace(manifest, segments=(segment, *manifest.segments[1:])), "0" * 64)


def laid_out(package: Package, folder: Path, arithmetic: Arithmetic, limit: int = 127) -> MappedWeights:
    """The first segment in an arithmetic, read back as the executor reads it."""
    folder.mkdir(exist_ok=True)
    segment = lay_out(package, folder, 0, arithmetic, limit)
    stored = PreparedPackage.as_stored(package).prepared
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return MappedWeights(
        PreparedPackage(package, folder, replace(stored, segments=(segment,), files=files)), 0
    )


@pytest.fixture
def by_hand(tmp_path) -> Package:
    """Two outputs of 64 inputs: one holds 50 at input 0 and -32 at input 32, the other nothing but zeros."""
    levels = np.full((2, 2, 32), 128, np.uint8)
    levels[0, 0, 0], levels[0, 1, 0] = 128 + 100, 0
    scales = np.array([[0.5, 0.25], [3.0, 4.0]], np.float32)
    return package_of(tmp_path / "package", levels, scales)


@pytest.mark.parametrize(("limit", "first", "second"), [(127, 127, -81), (63, 63, -40)])
def test_the_int8_layout_of_a_small_matrix(by_hand, tmp_path, limit: int, first: int, second: int) -> None:
    """Worked by hand: scale 50/127, 50 → 127, -32 · 127/50 = -81.28 → -81; a row of zeros has scale 1.

    The file: 64 × 2 levels, input by input; two scales; on the next cache line the bias; zeros to the end of a page.
    """
    weights = laid_out(by_hand, tmp_path / "out", "row_int8", limit)
    expected = np.zeros((64, 2), np.int8)
    expected[0, 0], expected[32, 0] = first, second
    scales = np.array([50 / np.float32(limit), 1], np.float32)
    assert set(weights.arrays) == {"m_int8", "m_int8_scales", "b"}
    assert np.array_equal(weights.arrays["m_int8"], expected)
    assert np.array_equal(weights.arrays["m_int8_scales"], scales)
    data = (tmp_path / "out" / "block0.bin").read_bytes()
    bias = np.array([7, 8], np.float32).tobytes()
    assert data[:256] == expected.tobytes() + scales.tobytes() + bytes(56) + bias + bytes(56)
    assert data[256:] == bytes(4096 - 256)


def test_the_float_layout_of_a_small_matrix(by_hand, tmp_path) -> None:
    """Float weights are the dequantised matrix, input by input."""
    weights = laid_out(by_hand, tmp_path / "out", "float")
    expected = np.zeros((64, 2), np.float32)
    expected[0, 0], expected[32, 0] = 50, -32
    assert set(weights.arrays) == {"m_float", "b"}
    assert np.array_equal(weights.arrays["m_float"], expected)
    assert weights.arrays["b"].tolist() == [7, 8]


@pytest.fixture
def by_hand_in_four_bits(tmp_path) -> Package:
    """One output of 96 inputs: all levels 9 around zero points 9, 1 and 4; input 1 has level 15, input 94 level 0."""
    levels = np.full((1, 3, 16), 0x99, np.uint8)
    levels[0, 0, 0], levels[0, 2, 15] = 0xF9, 0x90
    scales = np.array([[0.5, 0.25, 2.0]], np.float32)
    return package_of(tmp_path / "package", levels, scales, np.array([[0x19, 0x04]], np.uint8))


def test_the_layouts_of_four_bits(by_hand_in_four_bits, tmp_path) -> None:
    """By hand: (9 - 9)/2 = 0, (15 - 9)/2 = 3, (9 - 1)/4 = 2, (9 - 4)·2 = 10, (0 - 4)·2 = -8; int8 by 10/127."""
    expected = np.concatenate([np.zeros(32), np.full(32, 2), np.full(32, 10)]).astype(np.float32)[:, None]
    expected[1], expected[94] = 3, -8
    weights = laid_out(by_hand_in_four_bits, tmp_path / "float", "float").arrays
    assert set(weights) == {"m_float", "b"}
    assert np.array_equal(weights["m_float"], expected)
    weights = laid_out(by_hand_in_four_bits, tmp_path / "int8", "row_int8").arrays
    assert set(weights) == {"m_int8", "m_int8_scales", "b"}
    assert np.array_equal(weights["m_int8"], np.rint(expected * 12.7).astype(np.int8))
    assert weights["m_int8_scales"] == np.float32(10) / np.float32(127)
    weights = laid_out(by_hand_in_four_bits, tmp_path / "out", "block_int4").arrays
    assert set(weights) == {"m_levels", "m_scales", "m_zero_points", "b"}
    assert list((tmp_path / "out").iterdir()) == []


def test_block_int8_is_what_the_package_holds(by_hand, tmp_path) -> None:
    """The layout of block_int8 is the package's own: nothing is written."""
    weights = laid_out(by_hand, tmp_path / "out", "block_int8")
    assert weights.paths == ("weights/block.bin",)
    assert list((tmp_path / "out").iterdir()) == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 200),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 99),
    limit=st.sampled_from([63, 127]),
)
def test_int8_weights_are_within_half_a_level(
    tmp_path_factory, outputs: int, blocks: int, seed: int, limit: int
) -> None:
    """Each weight is within half a level of its row; no level exceeds the limit, and one of each row meets it."""
    generator = np.random.default_rng(seed)
    levels = generator.integers(0, 256, (outputs, blocks, 32), dtype=np.uint8)
    scales = generator.uniform(0.001, 1, (outputs, blocks)).astype(np.float32)
    folder = tmp_path_factory.mktemp("matrix")
    arrays = laid_out(package_of(folder / "p", levels, scales), folder / "out", "row_int8", limit).arrays
    exact = ((levels.astype(np.float32) - 128) * scales[:, :, None]).reshape(outputs, -1).T
    got, row_scales = arrays["m_int8"].astype(np.float32), arrays["m_int8_scales"]
    assert np.all(np.abs(got * row_scales - exact) <= row_scales * 0.5001)
    assert np.array_equal(np.abs(got).max(axis=0), np.full(outputs, limit))
    shutil.rmtree(folder)


def peak_of_laying_out(package: Package, folder: Path, arithmetic: Arithmetic) -> int:
    """Most bytes that Python and numpy hold at once while segment 0 is laid out in a new folder."""
    folder.mkdir()
    tracemalloc.start()
    try:
        lay_out(package, folder, 0, arithmetic, 127)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("arithmetic", ["row_int8", "float"])
def test_preparing_takes_memory_for_a_few_rows(tmp_path, arithmetic: Arithmetic) -> None:
    """Laying out a matrix of 16 MB in float allocates no more than some copies of 64 of its 4096 rows."""
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 256, (4096, 32, 32), dtype=np.uint8)
    package = package_of(tmp_path / "p", levels, np.ones((4096, 32), np.float32))
    assert peak_of_laying_out(package, tmp_path / "out", arithmetic) < 8 * layout.ROWS_AT_A_TIME * 1024 * 4


@pytest.mark.parametrize("arithmetic", ["row_int8", "float"])
def test_preparing_four_bits_takes_memory_for_a_few_rows(tmp_path, arithmetic: Arithmetic) -> None:
    """The same for a matrix in int4."""
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 256, (4096, 32, 16), dtype=np.uint8)
    zero_points = generator.integers(0, 256, (4096, 16), dtype=np.uint8)
    package = package_of(tmp_path / "p", levels, np.ones((4096, 32), np.float32), zero_points)
    assert peak_of_laying_out(package, tmp_path / "out", arithmetic) < 8 * layout.ROWS_AT_A_TIME * 1024 * 4


def changed(folder: Path, **changes: object) -> None:
    """Rewrite ``prepared.json`` with other fields."""
    path = folder / PREPARED
    path.write_bytes(
        msgspec.json.encode(replace(msgspec.json.decode(path.read_bytes(), type=Prepared), **changes))
    )


@pytest.fixture(scope="module")
def made(exported, tmp_path_factory) -> PreparedPackage:
    """The exported package in row_int8."""
    return prepare(exported.package, tmp_path_factory.mktemp("made") / "prepared", OnnxEngine(), "row_int8")


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """A copy of the prepared folder, to be spoiled."""
    return shutil.copytree(made.folder, tmp_path / "prepared")


def test_what_was_prepared_opens(exported, copied) -> None:
    """A folder opens as it was made, on this machine, for this package, with this engine."""
    assert is_current(copied, exported.package.sha256)
    opened = PreparedPackage.open(exported.package, copied, VERSION)
    assert opened.prepared.arithmetic == "row_int8"
    assert opened.prepared.engine == OnnxEngine().version == VERSION
    assert set(opened.prepared.files) == {"block_0.bin", "block_1.bin"}
    assert [segment.in_package for segment in opened.prepared.segments] == [True, False, False, True]


SPOILED = {
    "another CPU": (
        lambda folder: changed(folder, cpu="a CPU of last year"),
        "prepared for the CPU a CPU of",
    ),
    "another engine": (
        lambda folder: changed(folder, engine="onnxruntime 0.1"),
        "prepared for onnxruntime 0.1",
    ),
    "another package": (lambda folder: changed(folder, package_sha256="1" * 64), "from another package"),
    "another form": (lambda folder: changed(folder, version=99), "in form 99"),
    "a file missing": (lambda folder: (folder / "block_1.bin").unlink(), "lacks block_1.bin"),
    "a truncated file": (
        lambda folder: os.truncate(folder / "block_0.bin", 64),
        "lacks block_0.bin, or it is not",
    ),
    "damaged": (lambda folder: (folder / PREPARED).write_bytes(b'{"version": 1'), "malformed"),
    "nothing": (lambda folder: (folder / PREPARED).unlink(), "No such file or directory; agents prepare"),
    "no folder": (shutil.rmtree, "No such file or directory; agents prepare"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_cannot_be_used_is_said_and_made_again(exported, copied, how: str) -> None:
    """A folder for something else, or damaged, is refused with the reason; preparing replaces it."""
    spoil, reason = SPOILED[how]
    spoil(copied)
    with pytest.raises(PreparationError, match=reason):
        PreparedPackage.open(exported.package, copied, VERSION)
    assert not is_current(copied, exported.package.sha256)
    prepare(exported.package, copied, OnnxEngine(), "block_int8")
    assert is_current(copied, exported.package.sha256)
    assert PreparedPackage.open(exported.package, copied, VERSION).prepared.arithmetic == "block_int8"


def test_another_cpu_type_makes_a_folder_stale(exported, copied, monkeypatch) -> None:
    """Moved to a machine with another instruction set, a prepared folder is no longer current."""
    monkeypatch.setattr(prepared, "cpu_type", lambda: "aarch64 0xd40 0123456789ab")
    assert not is_current(copied, exported.package.sha256)
    with pytest.raises(PreparationError, match="this is aarch64"):
        PreparedPackage.open(exported.package, copied, VERSION)


def test_a_cpu_type_tells_instruction_sets_apart(tmp_path, monkeypatch) -> None:
    """Two descriptions that differ in flags alone give two types; without one the machine's name must do."""
    types = []
    for flags in ("avx2", "avx2 avx512_vnni"):
        (tmp_path / "cpuinfo").write_text(
            f"model name : Imagined 9000\nflags : {flags}\nbogomips : {flags}\n"
        )
        monkeypatch.setattr(prepared, "_CPU_INFO", tmp_path / "cpuinfo")
        types.append(prepared.cpu_type())
    assert types[0] != types[1]
    assert all("Imagined 9000" in each for each in types)
    monkeypatch.setattr(prepared, "_CPU_INFO", tmp_path / "nowhere")
    assert prepared.cpu_type() == os.uname().machine


def test_preparing_replaces_the_folder_as_a_whole(exported, copied) -> None:
    """Nothing of an older preparation stays, and no scratch folder is left beside it."""
    (copied / "old.bin").write_bytes(b"old")
    prepare(exported.package, copied, OnnxEngine(), "float")
    assert {path.name for path in copied.iterdir()} == {PREPARED, "block_0.bin", "block_1.bin"}
    assert [path.name for path in copied.parent.iterdir()] == ["prepared"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_before_it_is_full(exported, small_disk) -> None:
    """Too little room for all blocks: both figures, and what to do; the old folder stays, nothing else."""
    prepare(exported.package, small_disk / "prepared", OnnxEngine(), "block_int8")
    before = contents(small_disk / "prepared")
    with pytest.raises(
        DeviceError,
        match=r"takes [1-9][0-9.]* KiB, [1-9][0-9.]* KiB are free in .*disk; free some space or choose",
    ):
        prepare(exported.package, small_disk / "prepared", OnnxEngine(), "float")
    assert contents(small_disk / "prepared") == before
    assert [path.name for path in small_disk.iterdir()] == ["prepared"]


def test_a_disk_that_fills_up_while_measuring_is_told(exported, small_disk) -> None:
    """Too little room even for one block: a DeviceError with what is free, not a signal; nothing is left."""
    (small_disk / "filler").write_bytes(bytes(160 << 10))
    with pytest.raises(
        DeviceError, match=r"cannot prepare .*No space left on device; [0-9.]+ (KiB|bytes) are free"
    ):
        prepare(exported.package, small_disk / "prepared", OnnxEngine(), "float")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_limit_on_files_is_told(exported, copied) -> None:
    """Where files may not grow as large as a block, the old folder stays and the reason is given."""
    before = contents(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DeviceError, match=r"cannot prepare the package in .*File too large"):
            prepare(exported.package, copied, OnnxEngine(), "float")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["prepared"]


def test_the_figures_of_a_full_disk(exported, tmp_path, monkeypatch) -> None:
    """The message has what is needed and what is free."""
    monkeypatch.setattr(
        prepare_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000)
    )
    with pytest.raises(DeviceError, match=r"takes [1-9][0-9.]* [KM]iB, 1000 bytes are free in"):
        prepare(exported.package, tmp_path / "prepared", OnnxEngine(), "float")
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_the_packages_fault(exported, tmp_path) -> None:
    """A package whose weight file was cut short is a PackageError; nothing is left behind."""
    folder = shutil.copytree(exported.package.folder, tmp_path / "package")
    os.truncate(folder / "weights" / "block_1.bin", 4096)
    package = Package(folder, exported.package.manifest, exported.package.sha256)
    with pytest.raises(PackageError, match=r"block_1\.bin has 4096 bytes"):
        prepare(package, tmp_path / "prepared", OnnxEngine(), "row_int8")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_an_arithmetic_that_is_not_offered_is_refused(exported_plain, tmp_path) -> None:
    """A package in float offers float alone; the message lists what there is."""
    with pytest.raises(PreparationError, match="offers float, not row_int8"):
        prepare(exported_plain.package, tmp_path / "prepared", OnnxEngine(), "row_int8")
    assert prepare(exported_plain.package, tmp_path / "p", OnnxEngine()).prepared.arithmetic == "float"


class SaturatingEngine(OnnxEngine):
    """ONNX Runtime on a CPU whose int8 kernel adds pairs of products in 16 bits, and saturates."""

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> LoadedProgram:
        if program.stem != "probe":
            return super().load(program, weights, outputs)

        class Saturating:
            def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
                x, matrix = inputs["x"].astype(np.int64), inputs["matrix"].astype(np.int64)
                pairs = x[:, 0::2, None] * matrix[None, 0::2] + x[:, 1::2, None] * matrix[None, 1::2]
                return {"product": np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=1).astype(np.float32)}

        return Saturating()


def test_a_kernel_that_saturates_gets_smaller_weights(exported, tmp_path) -> None:
    """Where pairs of products overflow 16 bits, weights keep to 63: 2 · 255 · 63 fits, and the program still agrees."""
    assert weight_limit(exported.package, SaturatingEngine()) == 63
    assert 2 * 255 * 63 < 1 << 15 < 2 * 255 * 127
    made = prepare(exported.package, tmp_path / "prepared", SaturatingEngine(), "row_int8")
    assert made.prepared.weight_limit == 63
    for index in (1, 2):
        for name, array in MappedWeights(made, index).arrays.items():
            if name.endswith("_int8"):
                assert np.abs(array.astype(int)).max() == 63


def measured(monkeypatch, figures: dict[Arithmetic, tuple[float, float]]) -> None:
    """Pretend that a block took so many seconds in each arithmetic, and was wrong by so much."""

    def calibrate(package, work, engine, arithmetic, limit, *, four_draws):
        seconds, error = figures[arithmetic]
        return np.array([1 + error], np.float32), Calibration(1, 128, seconds / 3, seconds * 2 / 3, seconds)

    monkeypatch.setattr(prepare_module, "calibrate", calibrate)


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        ({"row_int8": (1.0, 0.01), "block_int8": (1.2, 0.01), "float": (3.0, 0.0)}, "row_int8"),
        ({"row_int8": (1.2, 0.01), "block_int8": (1.0, 0.01), "float": (3.0, 0.0)}, "block_int8"),
        ({"row_int8": (3.1, 0.01), "block_int8": (3.2, 0.01), "float": (3.0, 0.0)}, "float"),
        ({"row_int8": (1.0, 0.06), "block_int8": (2.0, 0.01), "float": (3.0, 0.0)}, "block_int8"),
        ({"row_int8": (1.0, 0.06), "block_int8": (2.0, 0.90), "float": (3.0, 0.0)}, "float"),
    ],
    ids=["fastest", "another machine", "no int8 kernel", "one is off", "both are off"],
)
def test_the_best_arithmetic_of_this_machine_is_chosen(
    exported, tmp_path, monkeypatch, figures, chosen
) -> None:
    """Of those whose output is close to float's, the fastest wins where all point the same way."""
    measured(monkeypatch, figures)
    made = prepare(exported.package, tmp_path / "prepared", OnnxEngine()).prepared
    assert made.arithmetic == chosen
    assert {each.arithmetic: each.seconds for each in made.candidates} == {
        name: pytest.approx(seconds) for name, (seconds, _) in figures.items()
    }
    assert made.calibration.dual_4_s == figures[chosen][0]


def test_a_poor_direction_costs_its_speed(exported, tmp_path, monkeypatch) -> None:
    """An arithmetic a tenth faster loses where its jvps keep a fifth less of their direction."""
    checks = dict(exported.package.manifest.self_checks)
    checks["row_int8"] = replace(checks["row_int8"], jvp_cosine=0.8)
    manifest = replace(exported.package.manifest, self_checks=checks)
    package = Package(exported.package.folder, manifest, exported.package.sha256)
    measured(monkeypatch, {"row_int8": (1.0, 0.0), "block_int8": (1.1, 0.0), "float": (9.0, 0.0)})
    assert prepare(package, tmp_path / "prepared", OnnxEngine()).prepared.arithmetic == "block_int8"


def test_an_operators_choice_is_taken(exported, tmp_path, monkeypatch) -> None:
    """A choice made by hand is prepared even where another would be faster, and alone is measured."""
    measured(monkeypatch, {"float": (9.0, 0.0)})
    made = prepare(exported.package, tmp_path / "prepared", OnnxEngine(), "float").prepared
    assert made.arithmetic == "float"
    assert len(made.candidates) == 1


def test_a_package_says_how_fast_each_arithmetic_is_here(exported, tmp_path) -> None:
    """Really measured: all arithmetics have a time and an error below the limit, float has none."""
    made = prepare(exported.package, tmp_path / "prepared", OnnxEngine()).prepared
    assert tuple(each.arithmetic for each in made.candidates) == exported.package.manifest.arithmetics
    assert all(each.seconds > 0 and each.error < prepare_module.ERROR_LIMIT for each in made.candidates)
    assert made.candidates[-1].error == 0
    assert 0 < made.calibration.primal_s < made.calibration.dual_4_s


def predicted_bytes(exported, arithmetic: Arithmetic, draws: int) -> int:
    """What a calibration with so many draws is predicted to take."""
    manifest = exported.package.manifest
    slices = tuple(spec.name for spec in manifest.slices if spec.kind != "head")
    work = Work(CALIBRATION_ROWS, min(CALIBRATION_TOKENS, manifest.sequence_limit), draws, slices)
    planner = Planner(manifest, arithmetic)
    return planner.predict(work, ExecutionChoice("streamed", CALIBRATION_ROWS, draws)).total_bytes


def cap_for(bytes_wanted: int) -> int:
    """The smallest cap of which a plan may use so much."""
    return int(bytes_wanted / USABLE_SHARE) + 2


def test_arithmetics_that_could_not_train_under_the_cap_are_not_run(exported, tmp_path) -> None:
    """Under a cap for the smallest arithmetic alone, it is the only candidate; with none it is still prepared."""
    needs = {name: predicted_bytes(exported, name, 1) for name in exported.package.manifest.arithmetics}
    smallest = min(needs, key=needs.__getitem__)
    assert sorted(needs.values())[0] < sorted(needs.values())[1]
    made = prepare(
        exported.package, tmp_path / "tight", OnnxEngine(), cap_bytes=cap_for(needs[smallest])
    ).prepared
    assert [candidate.arithmetic for candidate in made.candidates] == [smallest]
    hopeless = prepare(exported.package, tmp_path / "hopeless", OnnxEngine(), cap_bytes=1 << 20).prepared
    assert hopeless.arithmetic == ARITHMETICS[0]


def test_the_time_of_four_draws_is_extrapolated_where_they_do_not_fit(exported, tmp_path) -> None:
    """Without room for four draws at once, each further draw is taken to cost what the first one added."""
    cap_bytes = cap_for(predicted_bytes(exported, "row_int8", 1))
    assert cap_bytes * USABLE_SHARE < predicted_bytes(exported, "row_int8", 4)
    made = prepare(exported.package, tmp_path / "p", OnnxEngine(), "row_int8", cap_bytes).prepared
    times = made.calibration
    assert times.dual_4_s == times.dual_1_s + 3 * max(0.0, times.dual_1_s - times.primal_s)
