from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.errors import PackageError
from edge_runtime.execution.weights import GatheredRows, MappedWeights
from edge_runtime.memory.meter import mapped_bytes, status_bytes
from edge_runtime.package.manifest import TensorRef
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage, PreparedSegment
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.packages import FILES, make_manifest, write_package


@pytest.fixture
def package(tmp_path) -> Package:
    """The little package with 16 floats 0, 1, … as its weight."""
    data = np.arange(16, dtype="<f4").tobytes()
    manifest = make_manifest({**FILES, "weights/block.bin": data})
    key = generate_key()
    write_package(tmp_path, key, manifest)
    (tmp_path / "weights" / "block.bin").write_bytes(data)
    return Package.open(tmp_path, key.public_key)


def prepared_with(package: Package, tensors: dict[str, TensorRef]) -> PreparedPackage:
    """The package with these tensors in its first segment."""
    stored = PreparedPackage.as_stored(package)
    segments = (PreparedSegment(True, tensors), *stored.prepared.segments[1:])
    return PreparedPackage(package, stored.folder, replace(stored.prepared, segments=segments))


def mapped(package: Package, *tensor: object) -> np.ndarray:
    return MappedWeights(prepared_with(package, {"w": TensorRef("weights/block.bin", *tensor)}), 0).arrays[
        "w"
    ]


def test_tensors_are_views_of_the_file(package) -> None:
    """Offset, type and shape pick the bytes; the view is read-only and copies nothing."""
    got = mapped(package, 16, "float32", (3, 4))
    assert np.array_equal(got, np.arange(4, 16, dtype=np.float32).reshape(3, 4))
    assert not got.flags.writeable
    assert not got.flags.owndata


def test_files_are_mapped_from_their_beginning(package, monkeypatch: pytest.MonkeyPatch) -> None:
    """No map begins within a file, where kernels with pages of 16 or 64 KiB would refuse what one of 4 KiB takes."""
    offsets, real = [], mmap.mmap

    def mapping(*arguments: object, **named: object) -> mmap.mmap:
        offsets.append(named.get("offset", 0))
        return real(*arguments, **named)

    monkeypatch.setattr(mmap, "mmap", mapping)
    got = mapped(package, 16, "float32", (3, 4))
    assert got[0, 0] == 4
    assert offsets == [0]


@pytest.mark.parametrize(("dtype", "shape"), [("uint8", (64,)), ("int64", (2, 4)), ("float32", ())])
def test_every_element_type_and_a_scalar_map(package, dtype: str, shape: tuple[int, ...]) -> None:
    """Views have the manifest's own type and shape, scalars included."""
    got = mapped(package, 0, dtype, shape)
    assert (got.dtype, got.shape) == (np.dtype(dtype), shape)


def test_tensors_of_one_file_share_one_map(package) -> None:
    """A file is mapped once however many tensors lie in it."""
    references = {
        "a": TensorRef("weights/block.bin", 0, "float32", (4,)),
        "b": TensorRef("weights/block.bin", 16, "float32", (4,)),
    }
    weights = MappedWeights(prepared_with(package, references), 0)
    assert weights.paths == ("weights/block.bin",)
    bases = {id(_root(array)) for array in weights.arrays.values()}
    assert len(bases) == 1


def _root(array: np.ndarray) -> mmap.mmap:
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def test_released_pages_come_back(package) -> None:
    """After the kernel was told that pages are not needed, reading gives the same numbers."""
    weights = MappedWeights(PreparedPackage.as_stored(package), 0)
    weights.prefetch()
    weights.release()
    assert mapped_bytes([package.folder])[0] == 0
    assert np.array_equal(weights.arrays["weight"], np.arange(16, dtype=np.float32).reshape(4, 4))


def test_a_tensor_past_the_end_is_refused(package) -> None:
    """A tensor that ends outside its file is a PackageError that names the file."""
    with pytest.raises(PackageError, match=r"weights/block\.bin ends past"):
        mapped(package, 4, "float32", (4, 4))


def test_a_file_of_another_size_is_refused(package) -> None:
    """A weight file that shrank or grew since the manifest was written is refused before it is used."""
    (package.folder / "weights" / "block.bin").write_bytes(bytes(128))
    with pytest.raises(PackageError, match="128 bytes"):
        MappedWeights(PreparedPackage.as_stored(package), 0)


@pytest.mark.parametrize("data", [None, b""], ids=["missing", "empty"])
def test_a_file_that_cannot_be_mapped_is_refused(package, data: bytes | None) -> None:
    """A missing or empty weight file is a PackageError with its path."""
    path = package.folder / "weights" / "block.bin"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PackageError, match=r"cannot map .*block\.bin"):
        MappedWeights(PreparedPackage.as_stored(package), 0)


ROWS, COLUMNS = 30_000, 96


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[np.ndarray, Path]:
    """An embedding of thirty thousand rows in a file, after 64 bytes of something else."""
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    path = tmp_path_factory.mktemp("table") / "table.bin"
    path.write_bytes(bytes(64) + values.tobytes())
    return values, path


def gathered(table: tuple[np.ndarray, Path]) -> GatheredRows:
    values, path = table
    return GatheredRows(path, 64 + values.nbytes, TensorRef("t", 64, "float32", values.shape))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=64))
def test_gathered_rows_are_the_tables(table, rows: list[int]) -> None:
    """The rows asked for are those of the file, however often and in whatever shape they are named; others are zero."""
    values, _ = table
    got = gathered(table)
    got.fill(np.array([rows, rows]))
    assert np.array_equal(got.array[rows], values[rows])
    assert np.array_equal(np.flatnonzero(got.array.any(axis=1)), np.unique(rows))
    got.clear()
    assert not got.array[rows].any()


def test_gathered_rows_take_memory_only_while_they_are_there(table) -> None:
    """A thousand rows of a table of 11 MB take at most a page or two each, and clearing gives them back."""
    got = gathered(table)
    before = status_bytes("RssAnon")
    got.fill(np.arange(0, ROWS, 30))
    grown = status_bytes("RssAnon") - before
    assert 1_000 * 4096 * 0.9 < grown < 2_000 * 4096 * 1.1
    got.clear()
    assert status_bytes("RssAnon") - before < grown / 10


def test_a_gathered_table_is_mapped_nowhere(package) -> None:
    """A tensor named as gathered is read by rows; its file is not mapped for it."""
    references = {"w": TensorRef("weights/block.bin", 0, "float32", (4, 4))}
    weights = MappedWeights(prepared_with(package, references), 0, gathered=["w"])
    assert weights.paths == ()
    weights.gather("w", np.array([[2, 0], [2, 2]]))
    wanted = np.arange(16, dtype=np.float32).reshape(4, 4)
    wanted[[1, 3]] = 0
    assert np.array_equal(weights.arrays["w"], wanted)
    weights.drop_rows()
    assert not weights.arrays["w"].any()


def test_a_gathered_table_that_shrinks_is_named(package) -> None:
    """A file cut short after it was opened is a PackageError with its path, when a lost row is asked for."""
    path = package.folder / "weights" / "block.bin"
    rows = GatheredRows(path, 64, TensorRef("weights/block.bin", 0, "float32", (4, 4)))
    with path.open("r+b") as file:
        file.truncate(24)
    with pytest.raises(PackageError, match=r"block\.bin ends before row 1; fetch the package again"):
        rows.fill(np.array([0, 1]))


def test_a_gathered_table_of_another_size_is_refused(package) -> None:
    """A table whose file is missing, or too short for it, is a PackageError with its path."""
    path, tensor = package.folder / "weights" / "block.bin", TensorRef("w", 0, "float32", (5, 4))
    with pytest.raises(PackageError, match=r"block\.bin is not 64 bytes long"):
        GatheredRows(path, 64, tensor)
    path.unlink()
    with pytest.raises(PackageError, match=r"cannot read .*block\.bin: No such file"):
        GatheredRows(path, 64, tensor)
