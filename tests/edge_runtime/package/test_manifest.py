import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DigestError, FormatVersionError, PackageError, SignatureError
from edge_runtime.package.manifest import FORMAT_VERSION, MANIFEST, SIGNATURE, parse_manifest
from edge_runtime.package.package import Package
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.packages import FILES, make_manifest, write_package

PUBLISHER = generate_key()


def as_table() -> dict:
    return msgspec.to_builtins(make_manifest())


def test_a_package_opens_and_verifies(tmp_path) -> None:
    """What the publisher wrote and signed opens, verifies and finds its parts by name."""
    package = Package.open(write_package(tmp_path, PUBLISHER), PUBLISHER.public_key)
    package.verify_files()
    assert package.manifest.slice_named("block0.query").dimensions == 4
    assert package.manifest.head.name == "head"
    assert package.path("tokenizer.json").is_file()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_named(tmp_path, name: str) -> None:
    """One changed byte in any file is a DigestError that names the file."""
    package = Package.open(write_package(tmp_path, PUBLISHER), PUBLISHER.public_key)
    data = bytearray(FILES[name])
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DigestError, match=name):
        package.verify_files()


def test_a_changed_manifest_is_refused(tmp_path) -> None:
    """The signature covers the manifest's bytes, down to the last space."""
    write_package(tmp_path, PUBLISHER)
    (tmp_path / MANIFEST).write_bytes((tmp_path / MANIFEST).read_bytes() + b" ")
    with pytest.raises(SignatureError):
        Package.open(tmp_path, PUBLISHER.public_key)


def test_a_package_of_another_publisher_is_refused(tmp_path) -> None:
    """A good signature by the wrong key is a wrong signature."""
    write_package(tmp_path, generate_key())
    with pytest.raises(SignatureError, match="key of whoever"):
        Package.open(tmp_path, PUBLISHER.public_key)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE])
def test_a_folder_without_manifest_or_signature_is_no_package(tmp_path, name: str) -> None:
    """A missing manifest or signature is a PackageError that names the file."""
    write_package(tmp_path, PUBLISHER)
    (tmp_path / name).unlink()
    with pytest.raises(PackageError, match=name):
        Package.open(tmp_path, PUBLISHER.public_key)


def test_a_missing_file_is_named(tmp_path) -> None:
    """A listed file that is not there is a PackageError that names it."""
    package = Package.open(write_package(tmp_path, PUBLISHER), PUBLISHER.public_key)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(PackageError, match=r"tokenizer\.json"):
        package.verify_files()


def test_a_newer_format_is_named_as_such(tmp_path) -> None:
    """A newer format is told apart from a malformed manifest, even if its other fields are unknown."""
    data = msgspec.json.encode({"format_version": FORMAT_VERSION + 1, "brand_new": True})
    with pytest.raises(FormatVersionError, match="upgrade"):
        parse_manifest(data)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../b", "", "a//b", ".hidden", "a\\b", "a/b/c/d/e"]
)
def test_paths_cannot_leave_the_package(path: str) -> None:
    """A listed path that leads up, out or nowhere makes the manifest malformed."""
    table = as_table()
    table["files"][path] = {"bytes": 0, "sha256": "0" * 64}
    with pytest.raises(PackageError, match="malformed"):
        parse_manifest(msgspec.json.encode(table))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer": "other.json"}, "other.json"),
        ({"initial_state": "other.bin"}, "other.bin"),
        ({"probe": "other.onnx"}, "other.onnx"),
        ({"programs": {}}, "block"),
        ({"slices": []}, "head"),
        ({"labels": ["only"]}, "labels"),
        ({"segments": []}, "segments"),
    ],
)
def test_dangling_names_are_refused(change: dict[str, object], named: str) -> None:
    """Whatever the manifest names must be in it."""
    with pytest.raises(PackageError, match=named):
        parse_manifest(msgspec.json.encode({**as_table(), **change}))


def test_a_slice_beyond_the_last_segment_is_refused() -> None:
    """A slice must lie in a segment that exists."""
    table = as_table()
    table["slices"][0]["segments"] = [2]
    with pytest.raises(PackageError, match=r"segments \(2,\) of 2"):
        parse_manifest(msgspec.json.encode(table))


def test_two_slices_of_one_name_are_refused() -> None:
    """Slice names are keys, so they are unique."""
    table = as_table()
    table["slices"] = [*table["slices"], table["slices"][0]]
    with pytest.raises(PackageError, match="share a name"):
        parse_manifest(msgspec.json.encode(table))


def test_unknown_names_are_package_errors(tmp_path) -> None:
    """Asking for a slice or file that is not there names what was asked for."""
    package = Package.open(write_package(tmp_path, PUBLISHER), PUBLISHER.public_key)
    with pytest.raises(PackageError, match="nothing"):
        package.manifest.slice_named("nothing")
    with pytest.raises(PackageError, match=r"nothing\.bin"):
        package.path("nothing.bin")


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(data: bytes) -> None:
    """Whatever the manifest holds, parsing ends in a PackageError."""
    with pytest.raises(PackageError):
        parse_manifest(data)
