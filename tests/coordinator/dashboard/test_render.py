"""How figures and moments read, and what is served beside pages."""

from __future__ import annotations

import re

from coordinator.dashboard.render import STATIC, age, moment, render


def test_figures_read_well() -> None:
    """Moments and ages are in words; what there is not is a dash or never."""
    assert moment(None) == "–"
    assert moment(0) == "1970-01-01 00:00:00 UTC"
    assert [age(seconds, 100_000) for seconds in (None, 99_990, 99_700, 90_000, 0, 200_000)] == [
        *("never", "10 s ago", "5 min ago", "3 h ago", "1 d ago", "0 s ago")
    ]


def test_nothing_is_loaded_from_elsewhere() -> None:
    """Style, script and icon name no address, and the script makes no code of text."""
    for name, (_, text) in STATIC.items():
        assert set(re.findall(r"[a-z]+://[^\"' <]*", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert "@import" not in text
    script = STATIC["live.js"][1]
    assert "eval(" not in script
    assert "new Function" not in script


def test_a_page_names_whoever_looks() -> None:
    """A page for nobody in particular has no links to others, and carries no word of a session."""
    page = render("refused.html", None, title="Not done", code="x", message="<b>")
    assert "&lt;b&gt;" in page
    assert "Sign out" not in page
    assert 'name="csrf"' not in page
