"""Downloads kept by their sha256, within a disk quota, and packages laid out from them.

::

    blobs/<sha256>          complete and verified
    blobs/<sha256>.part     being downloaded; survives a restart
    packages/<sha256>/      the package in use: hard links to blobs, so it costs no space

A blob enters by verification only, and its age is its file's modification time: touched on every use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from edge_runtime.durable import TEMPORARY_SUFFIX, rename_durably, write_durably
from edge_runtime.errors import DeviceError, DigestError
from edge_runtime.package.manifest import MANIFEST, SIGNATURE, Manifest
from edge_runtime.package.package import Package, sha256_of

_PART_SUFFIX = ".part"


class BlobCache:
    """Blobs of one device; least recently used ones give way when the quota is met."""

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._verified: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, sha256: str) -> Path:
        """Where a download of this blob is gathered; what lies there may be continued."""
        return self._folder / f"{sha256}{_PART_SUFFIX}"

    def has(self, sha256: str) -> bool:
        """Whether the blob is held complete."""
        return self._path(sha256).exists()

    def accept(self, sha256: str) -> None:
        """Take a complete download in.

        Raises:
            DigestError: the bytes do not match ``sha256``; they are thrown away.
        """
        part = self.part(sha256)
        if sha256_of(part) != sha256:
            part.unlink()
            raise DigestError(f"the download of blob {sha256} does not match its sha256; it was thrown away")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        rename_durably(part, self._path(sha256))
        self._verified.add(sha256)

    def open_path(self, sha256: str) -> Path:
        """The file of a blob that is held, marked as used; its sha256 is checked once per process.

        Raises:
            DigestError: the file was damaged on the disk; it is removed, so that it is fetched anew.
        """
        path = self._path(sha256)
        if sha256 not in self._verified:
            if sha256_of(path) != sha256:
                path.unlink()
                raise DigestError(
                    f"blob {sha256} was damaged on the disk; it was removed and must be fetched again"
                )
            self._verified.add(sha256)
        os.utime(path)
        return path

    def make_room(self, needed_bytes: int, keep: Collection[str]) -> None:
        """Remove least recently used blobs until ``needed_bytes`` more fit into the quota and on the disk.

        Args:
            needed_bytes: size of the coming downloads.
            keep: blobs, complete or begun, that must stay.

        Raises:
            DeviceError: it does not fit even so; the message has the figures.
        """
        files = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        used_bytes = sum(path.stat().st_size for path in files)
        for path in files:
            if used_bytes + needed_bytes <= self._quota_bytes:
                break
            if path.name.removesuffix(_PART_SUFFIX) not in keep:
                used_bytes -= path.stat().st_size
                self._verified.discard(path.name)
                path.unlink()
        if used_bytes + needed_bytes > self._quota_bytes:
            raise DeviceError(
                f"{needed_bytes} bytes of downloads do not fit: disk_quota is {self._quota_bytes} bytes, "
                f"of which {used_bytes} are in use by this task; raise disk_quota or use a smaller package"
            )
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < needed_bytes:
            raise DeviceError(
                f"{needed_bytes} bytes of downloads do not fit: the disk of {self._folder} has "
                f"{free_bytes} bytes free; free some space"
            )

    def held_bytes(self, sha256: str) -> int:
        """Bytes of the blob that are here already, complete or begun."""
        for path in (self._path(sha256), self.part(sha256)):
            if path.exists():
                return path.stat().st_size
        return 0

    def used_bytes(self) -> int:
        """Size of all that is held, complete or begun."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256


class PackageShelf:
    """Holds one package at a time, laid out as a folder that :meth:`Package.open` accepts."""

    def __init__(self, folder: Path, blobs: BlobCache) -> None:
        self._folder = folder
        self._blobs = blobs
        folder.mkdir(parents=True, exist_ok=True)

    def clear_except(self, sha256: str) -> None:
        """Remove every package but this one, so that removing its blobs frees their space."""
        for path in self._folder.iterdir():
            if path.name != sha256:
                shutil.rmtree(path)

    def lay_out(
        self, manifest_data: bytes, manifest: Manifest, signature: str, publisher_key: str
    ) -> Package:
        """Link the package's files into place from blobs that are all held.

        Args:
            manifest_data: the manifest's bytes.
            manifest: what they parse to.
            signature: over ``manifest_data``, in base64.
            publisher_key: base64 public key that must have made it.

        Raises:
            DigestError: a blob was damaged on the disk.
            SignatureError: the signature is not by ``publisher_key``.
            OSError: the disk is full, or its file system has no hard links.
        """
        sha256 = hashlib.sha256(manifest_data).hexdigest()
        target = self._folder / sha256
        temporary = self._folder / f"{sha256}{TEMPORARY_SUFFIX}"
        self.clear_except(sha256)
        if target.exists():
            shutil.rmtree(target)
        for name, entry in manifest.files.items():
            place = temporary / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.hardlink_to(self._blobs.open_path(entry.sha256))
        write_durably(temporary / MANIFEST, manifest_data)
        write_durably(temporary / SIGNATURE, signature.encode("ascii"))
        rename_durably(temporary, target)
        return Package.open(target, publisher_key)
