"""Writing a file so that a reader, or the next start after a power cut, sees all of it or none of it."""

from __future__ import annotations

import os
from pathlib import Path

#: Ending of the name of every half-written file; no other file in these folders may have it.
TEMPORARY_SUFFIX = ".tmp"


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write ``data`` beside ``path``, flush it to the disk, then rename it into place.

    Args:
        path: the file to create or replace; its folder must exist.
        data: the whole content.
        mode: permission bits of the new file, before the umask.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is then as it was before. It names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor has no path
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(temporary, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # people asked for this name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` so that readers, and whoever comes after a killed process, see all of it or none of it.

    This does not wait for the disk, as :func:`write_durably` does: a power cut may lose the file.

    Args:
        path: the file to create or replace; its folder must exist.
        data: the whole content.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def rename_durably(source: Path, target: Path) -> None:
    """Rename within a file system and flush the folder: the new name survives a power cut."""
    source.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_folder(folder: Path) -> None:
    """Make a folder that nobody but its owner may enter (mode 0700), or close one that is there.

    Raises:
        OSError: it cannot be made; or it is open to others and somebody else's, so it cannot be closed.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
