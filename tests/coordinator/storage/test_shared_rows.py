"""What coordinators of a database agree on."""

from __future__ import annotations

from pathlib import Path

from coordinator.storage import shared_rows
from coordinator.storage.database import Storage


def test_the_first_word_counts(tmp_path: Path) -> None:
    """Whoever comes first says what holds; later ones are told that."""
    storage = Storage(tmp_path / "db")
    with storage.transaction() as connection:
        assert shared_rows.find(connection, "x") is None
        assert shared_rows.agree(connection, "x", "1") == "1"
        assert shared_rows.agree(connection, "x", "2") == "1"
        assert shared_rows.find(connection, "x") == "1"
    storage.close()
