"""Downloads kept by their sha256, within a disk quota, and packages laid out from them.

::

    blobs/<sha256>          complete and verified
    blobs/<sha256>.part     being downloaded; survives a restart
    packages/<sha256>/      the package in use: hard links to blobs, so it costs no space

A blob enters only after its sha256 was verified. Each use sets its file's modification time, which tells how long ago
it was needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from edge_runtime.durable import TEMPORARY_SUFFIX, rename_durably, sync_folder, write_durably
from edge_runtime.errors import DeviceError, DigestError
from edge_runtime.figures import size
from edge_runtime.package.manifest import MANIFEST, SIGNATURE, Manifest
from edge_runtime.package.package import Package, sha256_of

_PART_SUFFIX = ".part"


class BlobCache:
    """The downloaded blobs of one device. Where the quota is met, the least recently used ones are removed.

    Args:
        folder: folder of the blobs, created if there is none.
        quota_bytes: disk space that all blobs together may take.
    """

    def __init__(self, folder: Path, quota_bytes: int) -> None:
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._verified: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, sha256: str) -> Path:
        """Path where a download of this blob is gathered; what lies there may be continued."""
        return self._folder / f"{sha256}{_PART_SUFFIX}"

    def has(self, sha256: str) -> bool:
        """Whether the complete blob is here."""
        return self._path(sha256).exists()

    def accept(self, sha256: str) -> None:
        """Take in a complete download.

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
        """Path of a blob that is here, which now counts as used. Its sha256 is checked once per process.

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
            DeviceError: there is too little room even then; the message has the figures.
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
                f"{size(needed_bytes)} of downloads do not fit: disk_quota is {size(self._quota_bytes)}, "
                f"of which {size(used_bytes)} are in use by this task; raise disk_quota or use a smaller package"
            )
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < needed_bytes:
            raise DeviceError(
                f"{size(needed_bytes)} of downloads do not fit: the disk of {self._folder} has "
                f"{size(free_bytes)} free; free some space"
            )

    def held_bytes(self, sha256: str) -> int:
        """Bytes of the blob that are here already, whether it is complete or only begun."""
        for path in (self._path(sha256), self.part(sha256)):
            if path.exists():
                return path.stat().st_size
        return 0

    def used_bytes(self) -> int:
        """Disk space of all blobs, complete or begun."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256


class PackageShelf:
    """Holds the package of the present task, and that of the release in use, as folders for :meth:`Package.open`.

    Attributes:
        kept: digests of packages that stay as they are, because other processes may read them at any time.

    Args:
        folder: folder of the laid-out package, created if there is none.
        blobs: the blobs that packages are made of.
    """

    def __init__(self, folder: Path, blobs: BlobCache) -> None:
        self._folder = folder
        self._blobs = blobs
        self.kept: frozenset[str] = frozenset()
        self._verified: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def folder_of(self, sha256: str) -> Path:
        """Path of a package, laid out or not."""
        return self._folder / sha256

    def clear_except(self, sha256: str) -> None:
        """Remove every package but this one and those kept. Only then does removing their blobs free disk space."""
        for path in self._folder.iterdir():
            if path.name != sha256 and path.name not in self.kept:
                shutil.rmtree(path)

    def lay_out(
        self, manifest_data: bytes, manifest: Manifest, signature: str, publisher_key: str
    ) -> Package:
        """Link a package's files into place; the blobs of all of them must be here.

        Args:
            manifest_data: the manifest's bytes.
            manifest: the manifest, parsed from these bytes.
            signature: signature of ``manifest_data``, in base64.
            publisher_key: public key that must have made the signature, in base64.

        Raises:
            DigestError: a blob was damaged on the disk.
            SignatureError: the signature was not made with ``publisher_key``.
            OSError: the disk is full, or its file system has no hard links.
        """
        sha256 = hashlib.sha256(manifest_data).hexdigest()
        target = self._folder / sha256
        temporary = self._folder / f"{sha256}{TEMPORARY_SUFFIX}"
        self.clear_except(sha256)
        if target.exists() and sha256 in self.kept:
            package = Package.open(target, publisher_key)
            if sha256 not in self._verified:
                package.for_engine_of(manifest).verify_files()
                self._verified.add(sha256)
            return package
        if target.exists():
            shutil.rmtree(target)
        places = {temporary / name: entry.sha256 for name, entry in manifest.files.items()}
        for place, blob in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.hardlink_to(self._blobs.open_path(blob))
        for folder in {place.parent for place in places}:
            sync_folder(folder)  # links are names: without this a power cut leaves folders without files
        write_durably(temporary / MANIFEST, manifest_data)
        write_durably(temporary / SIGNATURE, signature.encode("ascii"))
        rename_durably(temporary, target)
        return Package.open(target, publisher_key)
