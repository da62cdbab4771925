"""A model of what a power cut leaves on a disk, for the files of this process below one folder.

What was flushed is kept: a file's bytes as they were at its last ``fsync``, a folder's list of names as it was at its
own. Of what was not flushed a file system may keep any part, and names before bytes. So by lot each folder is as it was
flushed or as it stood, and each file is as flushed, or has some first part of its bytes, perhaps none. Not modelled:
disks that tear or reorder blocks behind a flush that they acknowledged; and what child processes flush counts as never
flushed.

A cut comes when the process is about to open, rename, link, remove, make or flush something.
"""

from __future__ import annotations

import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"})


class PowerCutError(BaseException):
    """The process ends here; nothing may catch it."""


class Disk:
    """The disk below a folder.

    Args:
        root: the folder.
        left: folder that gets what a cut leaves.
        lot: what decides about everything that was not flushed.
        cut_at: number of the moment, from 1, at which the power is cut; None never cuts it.
    """

    def __init__(self, root: Path, left: Path, lot: random.Random, cut_at: int | None = None) -> None:
        self.moments = 0
        self._root, self._left, self._lot, self._cut_at = root, left, lot, cut_at
        self._busy = False
        #: Descriptors by inode: they keep files that were removed, and inodes from being used again.
        self._held: dict[int, int] = {}
        #: What was flushed last: a file's bytes, and a folder's names with the inodes behind them.
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block moments are counted and flushes noted."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._flush)
            _disks.append(self)
            try:
                yield
            finally:
                _disks.remove(self)
                for descriptor in self._held.values():
                    os.close(descriptor)

    def cut_during(self, work: Callable[[], None]) -> None:
        """Do work until the cut comes, or cut the power when it is done."""
        with suppress(PowerCutError), self.recording():
            work()
            self._cut_at = self.moments + 1
            self.moment((self._root,))

    def moment(self, paths: tuple[Any, ...]) -> None:
        """Something is about to happen to paths."""
        if self._busy or not any(self._is_below(path) for path in paths):
            return
        self.moments += 1
        if self.moments == self._cut_at:
            self._busy = True  # what cleans up on the way out does not count any more
            self._leave(self._hold(self._root), self._left, {})
            raise PowerCutError

    def _leave(self, folder: int, target: Path, linked: dict[int, Path]) -> None:
        target.mkdir(mode=0o700)
        path = self._path(folder)
        present = self._list(path) if path.is_dir() else {}
        names = present if self._lot.random() < 0.5 else self._names.get(folder, {})
        for name, entry in sorted(names.items()):
            if stat.S_ISDIR(os.fstat(self._held[entry]).st_mode):
                self._leave(entry, target / name, linked)
            elif entry in linked:
                (target / name).hardlink_to(linked[entry])
            else:
                linked[entry] = target / name
                (target / name).write_bytes(self._left_of(entry))

    def _left_of(self, file: int) -> bytes:
        whole = self._whole(file)
        flushed = self._bytes.get(file)
        if flushed == whole or (flushed is not None and self._lot.random() < 0.5):
            return flushed
        return whole[: self._lot.choice((0, self._lot.randint(0, len(whole))))]

    def _flush(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if self._busy or not self._is_below(path):
            return
        self.moment((path,))
        inode = self._hold(path)
        if path.is_dir():
            self._names[inode] = self._list(path)
        else:
            self._bytes[inode] = self._whole(inode)

    def _whole(self, file: int) -> bytes:
        return os.pread(self._held[file], os.fstat(self._held[file]).st_size, 0)

    def _list(self, folder: Path) -> dict[str, int]:
        return {path.name: self._hold(path) for path in folder.iterdir()}

    def _path(self, inode: int) -> Path:
        """Where a file or folder is now."""
        return Path(f"/proc/self/fd/{self._held[inode]}").readlink()

    def _hold(self, path: Path) -> int:
        """The number of a file or folder, which stays its own from now on, whatever becomes of the name."""
        busy, self._busy = self._busy, True
        try:
            inode = path.stat().st_ino
            if inode not in self._held:
                self._held[inode] = os.open(path, os.O_RDONLY)
            return inode
        finally:
            self._busy = busy

    def _is_below(self, path: object) -> bool:
        return isinstance(path, str | bytes | Path) and Path(os.fsdecode(path)).is_relative_to(self._root)


_disks: list[Disk] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if _disks and event in EVENTS:
        _disks[-1].moment(arguments)


sys.addaudithook(_heard)  # it cannot be taken away, and does nothing without a disk
