"""What is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError, ModelError
from export.packaging.early_checks import check_early
from tests.export import tiny


def test_a_good_request_has_nothing_to_say(tiny_model: Path, tmp_path: Path) -> None:
    """A whole folder, a free output and an installed engine: no refusal, no note."""
    assert check_early(tiny_model, tiny.LABELS, tmp_path / "out", ("onnxruntime",)) == ()


def test_an_output_that_exists_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Whatever lies there is left alone."""
    with pytest.raises(ModelError, match="exists already; choose another --output or remove it"):
        check_early(tiny_model, tiny.LABELS, tmp_path, ("onnxruntime",))


def test_an_engine_that_is_not_installed_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message gives the install command."""
    from importlib import metadata

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ConfigError, match=r"pip install 'edge-runtime\[executorch\]'"):
        check_early(tiny_model, tiny.LABELS, tmp_path / "out", ("executorch",))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A mistyped path is told as such."""
    with pytest.raises(ModelError, match=r"nowhere is no folder; name the model's folder"):
        check_early(tmp_path / "nowhere", (), tmp_path / "out", ("onnxruntime",))
