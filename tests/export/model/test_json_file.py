"""JSON files of a model folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import ModelError
from export.model import json_file
from export.model.json_file import read_json_object


def test_an_object_is_read(tmp_path: Path) -> None:
    """A file with one object gives that object."""
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json_object(tmp_path / "a.json") == {"a": [1]}


@pytest.mark.parametrize("content", [b"[1]", b"1", b"{", b"\xff", b"[" * 100_000])
def test_anything_else_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    """Other values, torn files and absurd nesting are refused, with the path."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.json"):
        read_json_object(tmp_path / "a.json")


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file over the limit is refused with both sizes."""
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 3)
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ModelError, match="has 8 bytes, over the limit of 3"):
        read_json_object(tmp_path / "a.json")
