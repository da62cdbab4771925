from __future__ import annotations

import mmap

import numpy as np
import pytest
from msgspec.structs import replace

from edge_runtime.errors import PackageError
from edge_runtime.package import Package, TensorRef
from edge_runtime.signing import generate_key
from edge_runtime.weights import MappedWeights
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


def mapped(package: Package, *tensor: object) -> np.ndarray:
    segment = replace(package.manifest.segments[0], weights={"w": TensorRef("weights/block.bin", *tensor)})
    return MappedWeights(package, segment).arrays["w"]


def test_tensors_are_views_of_the_file(package) -> None:
    """Offset, type and shape pick the bytes; the view is read-only and copies nothing."""
    got = mapped(package, 16, "float32", (3, 4))
    assert np.array_equal(got, np.arange(4, 16, dtype=np.float32).reshape(3, 4))
    assert not got.flags.writeable
    assert not got.flags.owndata


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
    weights = MappedWeights(package, replace(package.manifest.segments[0], weights=references))
    bases = {id(_root(array)) for array in weights.arrays.values()}
    assert len(bases) == 1


def _root(array: np.ndarray) -> mmap.mmap:
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def test_released_pages_come_back(package) -> None:
    """After the kernel was told that pages are not needed, reading gives the same numbers."""
    weights = MappedWeights(package, package.manifest.segments[0])
    weights.release_pages()
    assert np.array_equal(weights.arrays["weight"], np.arange(16, dtype=np.float32).reshape(4, 4))


def test_a_tensor_past_the_end_is_refused(package) -> None:
    """A tensor that ends outside its file is a PackageError that names the file."""
    with pytest.raises(PackageError, match=r"weights/block\.bin ends past"):
        mapped(package, 4, "float32", (4, 4))


def test_a_file_of_another_size_is_refused(package) -> None:
    """A weight file that shrank or grew since the manifest was written is refused before it is used."""
    (package.folder / "weights" / "block.bin").write_bytes(bytes(128))
    with pytest.raises(PackageError, match="128 bytes"):
        MappedWeights(package, package.manifest.segments[0])


@pytest.mark.parametrize("data", [None, b""], ids=["missing", "empty"])
def test_a_file_that_cannot_be_mapped_is_refused(package, data: bytes | None) -> None:
    """A missing or empty weight file is a PackageError with its path."""
    path = package.folder / "weights" / "block.bin"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PackageError, match=r"cannot map .*block\.bin"):
        MappedWeights(package, package.manifest.segments[0])
