"""Content-addressed files: a blob is named by the sha256 of its bytes and never changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol

from edge_runtime.durable import TEMPORARY_SUFFIX, rename_durably, write_durably, write_whole
from edge_runtime.errors import DigestError
from edge_runtime.package.package import sha256_of


class Blobs(Protocol):
    """What is asked of a store of blobs, wherever they are; :class:`BlobStore` says what each does."""

    @property
    def is_remote(self) -> bool:
        """Whether storing and fetching may take long, because another machine does it."""

    def put(self, data: bytes) -> str:
        """Store bytes and return their sha256."""

    def put_file(self, source: Path, sha256: str) -> None:
        """Copy a file in under its known digest."""

    def link_file(self, source: Path, sha256: str) -> None:
        """Take a file in, if possible without a copy."""

    def find(self, sha256: str) -> Path | None:
        """Where the blob lies on this machine, once it was fetched, or None if there is none."""

    def here(self, sha256: str) -> Path | None:
        """The same without fetching it."""

    def get(self, sha256: str) -> bytes:
        """The bytes of a small blob."""

    def discard(self, sha256: str) -> None:
        """Remove a blob if it is there."""

    def sweep(self, needed: Callable[[], Collection[str]], *, before_s: float) -> int:
        """Remove what is not needed and older than ``before_s``."""

    def digests(self) -> Iterator[str]:
        """Digests of all blobs."""

    def address(self, sha256: str) -> str:
        """An address at which a device can fetch a blob itself; of a folder there is none."""


class BlobStore:
    """A folder of blobs. Threads that write take turns; threads that read need not.

    Args:
        folder: folder of the blobs, created if missing.
        durable: whether bytes are on the disk once they are stored; if not, a power cut may lose them alone.
    """

    is_remote = False

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder
        self._write = write_durably if durable else write_whole
        self._turn = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Store bytes and return their sha256; storing them again changes nothing."""
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._path(sha256)
        with self._turn:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                self._write(path, data)
        return sha256

    def put_file(self, source: Path, sha256: str) -> None:
        """Copy a file in under its known digest.

        Raises:
            DigestError: the copy does not match ``sha256``.
        """
        path = self._path(sha256)
        with self._turn:
            if path.exists():
                return
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
            try:
                shutil.copyfile(source, temporary)
                if sha256_of(temporary) != sha256:
                    raise DigestError(f"{source} changed while it was copied; export the package again")
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                rename_durably(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def link_file(self, source: Path, sha256: str) -> None:
        """Take a file in without a copy: it must lie on the same file system, hold these bytes and never change."""
        path = self._path(sha256)
        with self._turn:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.hardlink_to(source)

    def find(self, sha256: str) -> Path | None:
        """Where the blob lies, or None if there is none."""
        path = self._path(sha256)
        return path if path.is_file() else None

    def here(self, sha256: str) -> Path | None:
        """The same: nothing has to be fetched."""
        return self.find(sha256)

    def adopt(self, file: Path, sha256: str) -> Path:
        """Take over a file of the same file system whose bytes were compared with the digest, and say where it lies."""
        path = self._path(sha256)
        with self._turn:
            path.parent.mkdir(exist_ok=True)
            file.replace(path)
        return path

    def get(self, sha256: str) -> bytes:
        """The bytes of a small blob.

        Raises:
            DigestError: the blob is missing or was damaged on the disk.
            OSError: it cannot be read, which is no damage: descriptors may have run out.
        """
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise DigestError(f"blob {sha256} is missing from the state folder: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DigestError(f"blob {sha256} is damaged; restore the state folder from a backup")
        return data

    def discard(self, sha256: str) -> None:
        """Remove a blob if it is there."""
        self._path(sha256).unlink(missing_ok=True)

    def sweep(self, needed: Callable[[], Collection[str]], *, before_s: float) -> int:
        """Remove what is not needed, half-written files among it, and return how many files went.

        Args:
            needed: function that tells the digests that are, asked after the files were listed.
            before_s: a file that was written after this moment, in seconds since 1970 by the machine's clock, stays: it
                may be about to be needed.
        """
        old = [path for path in self.folder.glob("*/*") if path.stat().st_mtime < before_s]
        keep = needed()
        gone = [path for path in old if path.name not in keep]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    def digests(self) -> Iterator[str]:
        """Digests of all blobs."""
        return (path.name for path in self.folder.glob("??/*") if len(path.name) == 64)

    def address(self, sha256: str) -> str:
        """:class:`LookupError`: what lies in a folder is served from here."""
        raise LookupError(f"blob {sha256} lies in a folder, which has no address")

    def trim(self, most_bytes: int) -> None:
        """Remove the files that were written or used longest ago, until no more than so many bytes are left."""
        files = [(path.stat(), path) for path in self.folder.glob("??/*")]
        total_bytes = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime):
            if total_bytes <= most_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= status.st_size

    def place(self, sha256: str) -> str:
        """Path of a blob within its store; :class:`DigestError` for what is no digest."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise DigestError("a blob is named by 64 hexadecimal digits")
        return f"{sha256[:2]}/{sha256}"

    def _path(self, sha256: str) -> Path:
        return self.folder / self.place(sha256)
