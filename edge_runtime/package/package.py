"""An opened package folder: its manifest checked, its files by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edge_runtime.engines.names import EngineName
from edge_runtime.errors import DigestError, PackageError
from edge_runtime.package.manifest import (
    HASH_CHUNK_BYTES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Manifest,
    parse_manifest,
)


class Package:
    """A package folder whose manifest has been verified.

    The other files are verified by :meth:`verify_files`, or by whoever downloaded them.

    Attributes:
        folder: path of the package folder.
        manifest: the manifest.
        sha256: digest of the manifest's bytes, which names the package.
    """

    def __init__(self, folder: Path, manifest: Manifest, sha256: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.sha256 = sha256

    @classmethod
    def open(cls, folder: Path, publisher_key: str) -> Package:
        """Read and verify the manifest.

        Args:
            folder: path of the package folder.
            publisher_key: Ed25519 public key that must have signed the manifest, in base64.

        Raises:
            PackageError: a file is missing or malformed; names the file.
            FormatVersionError: the package is of another format.
            SignatureError: the signature is missing or was not made with ``publisher_key``.
        """
        from edge_runtime.protocol.signing import verify  # noqa: PLC0415 - 7 MB, which the training process does without

        data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
        signature = _read(folder / SIGNATURE, 1024).decode("ascii", "replace").strip()
        verify(publisher_key, data, signature, what=f"package {folder}")
        return cls(folder, parse_manifest(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def open_known(cls, folder: Path, sha256: str) -> Package:
        """Read a package whose manifest's digest is known from a trusted place, such as a signed task.

        No signature is checked, because the digest names these very bytes. The training process opens packages this
        way, since it saves the memory of a signature library.

        Args:
            folder: path of the package folder.
            sha256: digest of the manifest's bytes.

        Raises:
            PackageError: a file is missing or malformed.
            DigestError: the folder holds another manifest.
        """
        data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise DigestError(
                f"{folder / MANIFEST} has sha256 {found}, the task names {sha256}; fetch the package again"
            )
        return cls(folder, parse_manifest(data), sha256)

    @classmethod
    def open_unsigned(cls, folder: Path) -> Package:
        """Read a package without checking who made it, for diagnostics of a folder that the operator names.

        Raises:
            PackageError: a file is missing or malformed.
            FormatVersionError: the package is of another format.
        """
        data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
        return cls(folder, parse_manifest(data), hashlib.sha256(data).hexdigest())

    def for_engine(self, engine: EngineName) -> Package:
        """The same package with its manifest narrowed to one engine (:meth:`Manifest.for_engine`).

        Raises:
            PackageError: the package has no programs for the engine.
        """
        return Package(self.folder, self.manifest.for_engine(engine), self.sha256)

    def for_engine_of(self, manifest: Manifest) -> Package:
        """The same package with a manifest that was narrowed to one engine before."""
        return Package(self.folder, manifest, self.sha256)

    def path(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            PackageError: it lists no such file.
        """
        if name not in self.manifest.files:
            raise PackageError(f"package {self.manifest.name} lists no file {name!r}")
        return self.folder / name

    def verify_files(self) -> None:
        """Check size and sha256 of every listed file.

        Raises:
            PackageError: a file is missing; names it.
            DigestError: a file has other bytes; names it.
        """
        for name, entry in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                raise PackageError(f"package {self.folder} lacks {name}; fetch or export it again")
            if path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
                raise DigestError(
                    f"{path} does not match the sha256 in its manifest; fetch or export it again"
                )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise PackageError(f"{path} has {size} bytes, over the limit of {limit_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise PackageError(f"cannot read {path}: {error.strerror}; is this a package folder?") from error
