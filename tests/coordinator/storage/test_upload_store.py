"""Begun uploads on the disk: they grow, and a full disk leaves them as they were."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from coordinator.storage.upload_store import UploadStore

SHA256 = hashlib.sha256(b"abcdef").hexdigest()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half of a part is written when the disk is full, that half goes, and the upload can go on."""
    store = UploadStore(tmp_path / "uploads")
    assert store.append("t", SHA256, b"abc") == 3
    real = Path.open

    class Full:
        def __init__(self, path: Path) -> None:
            self.file = real(path, "ab")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:1])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def full(path: Path, *_: Any) -> Full:
        return Full(path)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="space"):
        store.append("t", SHA256, b"def")
    monkeypatch.undo()
    assert store.received_bytes("t", SHA256) == 3
    assert store.append("t", SHA256, b"def") == 6
    assert store.whole("t", SHA256) == b"abcdef"


def test_tasks_whose_names_begin_alike_are_told_apart(tmp_path: Path) -> None:
    """Discarding one task's upload leaves that of another, whatever dots their names have."""
    store = UploadStore(tmp_path / "uploads")
    store.append("r.1", SHA256, b"x")
    store.append("r", SHA256, b"y")
    store.discard("r")
    assert store.received_bytes("r.1", SHA256) == 1
    assert store.sweep(lambda: {"r"}) == 1
