"""Results on their way in parts, in files and in a database."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from coordinator.storage.connection import Database
from coordinator.storage.database import Storage
from coordinator.storage.postgres import PostgresStorage
from coordinator.storage.upload_parts import UploadParts
from coordinator.storage.upload_store import Uploads, UploadStore
from tests.coordinator.storage.servers import (
    needs_postgres,
    shared_postgres,
)


@pytest.mark.parametrize("kind", ["files", pytest.param("rows", marks=needs_postgres)])
def test_uploads_grow_by_parts(kind: str, tmp_path: Path) -> None:
    """Parts are added where the upload stands, another upload of the task ends it, and other bytes are not kept."""
    database: Database
    uploads: Uploads
    if kind == "files":
        database, uploads = Storage(tmp_path / "db"), UploadStore(tmp_path / "uploads")
    else:
        database = PostgresStorage(shared_postgres().fresh("parts"))
        uploads = UploadParts(database)
    sha256, other = hashlib.sha256(b"abcdef").hexdigest(), hashlib.sha256(b"x").hexdigest()
    with database.transaction():
        assert uploads.append("t", other, b"y") == 1
        assert uploads.append("t", sha256, b"abc") == 3
    with database.reading():
        assert (uploads.received_bytes("t", sha256), uploads.received_bytes("t", other)) == (3, 0)
    assert uploads.append("t", sha256, b"def") == 6
    assert uploads.whole("t", sha256) == b"abcdef"
    assert uploads.append("u", other, b"z") == 1
    assert uploads.whole("u", other) is None
    assert uploads.received_bytes("u", other) == 0
    assert uploads.sweep(lambda: {"t"}) == 0
    uploads.append("u", other, b"z")
    assert uploads.sweep(lambda: {"t"}) == 1
    uploads.discard("t")
    assert uploads.received_bytes("t", sha256) == 0
    database.close()
