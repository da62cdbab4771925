import re
from pathlib import Path

from edge_runtime import errors
from edge_runtime.errors import CapExceededError, EdgeError, OutOfMemoryError, RefusedError, UnreachableError

PAGES = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EdgeError)
]


def test_every_class_has_a_help_section() -> None:
    """docs/errors.md has one section a class, headed by exit code and name, that says what to do."""
    sections = dict(re.findall(r"^## (\d+ \w+)\n(.*?)(?=^## |\Z)", PAGES, flags=re.MULTILINE | re.DOTALL))
    assert set(sections) == {f"{kind.exit_code} {kind.__name__}" for kind in CLASSES}
    for heading, text in sections.items():
        assert "What happened." in text, heading
        assert "What to do." in text, heading


def test_exit_codes_are_distinct() -> None:
    """Every class can be told from the exit code alone, and none collides with argparse or the shell."""
    codes = [kind.exit_code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(code == 1 or 10 <= code < 64 for code in codes)


def test_every_class_is_drawn_in_the_tree() -> None:
    """The tree at the top of errors.py shows every class."""
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in CLASSES)


def test_errors_carry_their_figures() -> None:
    """Errors that others act upon carry figures and codes as attributes, not only in words."""
    cap = CapExceededError("too much", required_bytes=2, cap_bytes=1)
    assert (cap.required_bytes, cap.cap_bytes) == (2, 1)
    killed = OutOfMemoryError("killed", phase="step", last_bytes=2, cap_bytes=1, enforced_by="cgroup_v1")
    assert (killed.phase, killed.last_bytes, killed.cap_bytes, killed.enforced_by) == (
        "step",
        2,
        1,
        "cgroup_v1",
    )
    assert RefusedError("no", code="revoked").code == "revoked"
    assert UnreachableError("later", retry_after_s=3.0).retry_after_s == 3.0
    assert UnreachableError("later").retry_after_s is None
