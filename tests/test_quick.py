"""How quick tests are told from others, by their files and as they run."""

from __future__ import annotations

import os

import pytest

from tests.quick import TESTS, file_is_quick


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("edge_runtime/protocol/test_signing.py", True),
        ("export/tiny.py", False),  # imports torch
        ("edge_runtime/training/test_losses.py", False),  # imports tests.export.tiny, which does
        ("end_to_end/test_kills.py", False),  # its folder's conftest.py imports what starts processes
    ],
)
def test_a_file_is_quick_if_nothing_it_imports_is_slow(name: str, quick: bool) -> None:
    """Torch and processes count wherever they come in: in the file, in what it imports, in its conftest.py."""
    assert file_is_quick(TESTS / name) is quick


def test_a_quick_test_cannot_start_a_process(request: pytest.FixtureRequest) -> None:
    """This test counts as quick, so the process it tries to start is refused and named."""
    assert request.node.get_closest_marker("quick") is not None
    with pytest.raises(RuntimeError, match=r"cannot_start_a_process counts as quick .* it does os\.system"):
        os.system("true")  # noqa: S605 - refused
