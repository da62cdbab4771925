"""The threat model names the test of each line, and each of these exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/threat-model.md").read_text("utf-8")


def test_every_line_has_a_test_that_exists() -> None:
    """Each line of the tables ends with ``file::test``, and the file has that test."""
    lines = [
        line
        for line in PAGE.splitlines()
        if line.startswith("| ") and not line.startswith(("| can ", "| ---"))
    ]
    assert len(lines) > 20
    for line in lines:
        found = re.search(r"`(tests/[\w/]+\.py)::(\w+)` \|$", line)
        assert found is not None, line
        text = (ROOT / found.group(1)).read_text("utf-8")
        assert re.search(rf"^def {found.group(2)}\(", text, re.MULTILINE), line


def test_every_party_has_its_part() -> None:
    """Coordinator, readers of models, devices, publisher, network, and hosts of the storage."""
    parts = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    for word in ("coordinator", "models", "device", "publisher", "network", "database"):
        assert any(word in part for part in parts), word
