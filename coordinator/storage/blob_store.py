"""Content-addressed files: a blob is named by the sha256 of its bytes and never changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from edge_runtime.durable import TEMPORARY_SUFFIX, rename_durably, write_durably, write_whole
from edge_runtime.errors import DigestError
from edge_runtime.package.package import sha256_of


class BlobStore:
    """A folder of blobs. Threads that write take turns; threads that read need not.

    Args:
        folder: folder of the blobs, created if missing.
        durable: whether bytes are on the disk once they are stored; if not, a power cut may lose them alone.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
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
        old = [path for path in self._folder.glob("*/*") if path.stat().st_mtime < before_s]
        keep = needed()
        gone = [path for path in old if path.name not in keep]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    def _path(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise DigestError("a blob is named by 64 hexadecimal digits")
        return self._folder / sha256[:2] / sha256
