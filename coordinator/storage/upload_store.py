"""Results on their way in parts: one file a task, which grows as parts come, and goes once the result is decided about.

``uploads/TASK.SHA256`` holds the first bytes of a result whose whole sha256 the device has announced. Nothing waits for
the disk: after a power cut the bytes may be others, which their sha256 then tells.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol


class Uploads(Protocol):
    """What is asked of whatever holds begun uploads; :class:`UploadStore` says what each does."""

    def received_bytes(self, task_id: str, sha256: str) -> int:
        """How many bytes of a result are here."""

    def append(self, task_id: str, sha256: str, data: bytes) -> int:
        """Add bytes to a result, and return how many are here now."""

    def whole(self, task_id: str, sha256: str) -> bytes | None:
        """A result whose bytes are all here; None, and no byte is kept, if they are not those of its sha256."""

    def discard(self, task_id: str) -> None:
        """Forget what came of a task's result."""

    def sweep(self, wanted: Callable[[], Collection[str]]) -> int:
        """Remove what came of results that nobody waits for any more."""


class UploadStore:
    """A folder of begun uploads. Its callers take turns.

    Args:
        folder: folder of the uploads, made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)

    def received_bytes(self, task_id: str, sha256: str) -> int:
        """How many bytes of a result are here."""
        path = self._path(task_id, sha256)
        return path.stat().st_size if path.exists() else 0

    def append(self, task_id: str, sha256: str, data: bytes) -> int:
        """Add bytes to a result, and return how many are here now. What was begun of another of the task goes.

        Raises:
            OSError: the disk is full; what was here before is as it was.
        """
        path = self._path(task_id, sha256)
        for other in self._of_task(task_id):
            if other != path:
                other.unlink(missing_ok=True)
        before = self.received_bytes(task_id, sha256)
        try:
            with path.open("ab") as file:
                file.write(data)
        except OSError:
            os.truncate(path, before)
            raise
        return before + len(data)

    def whole(self, task_id: str, sha256: str) -> bytes | None:
        """A result whose bytes are all here; None, and no byte is kept, if they are not those of its sha256."""
        path = self._path(task_id, sha256)
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        self.discard(task_id)
        return None

    def discard(self, task_id: str) -> None:
        """Forget what came of a task's result."""
        for path in self._of_task(task_id):
            path.unlink(missing_ok=True)

    def sweep(self, wanted: Callable[[], Collection[str]]) -> int:
        """Remove what came of results that nobody waits for any more, and return how many files went.

        Args:
            wanted: function that tells the ids of the tasks that are waited for, asked after the files were listed.
        """
        paths = list(self._folder.iterdir())
        keep = wanted()
        gone = [path for path in paths if path.name.rpartition(".")[0] not in keep]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    def _of_task(self, task_id: str) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name.rpartition(".")[0] == task_id]

    def _path(self, task_id: str, sha256: str) -> Path:
        return self._folder / f"{task_id}.{sha256}"
