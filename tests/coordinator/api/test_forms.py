"""Forms of pages: what is read, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.api.body import Body
from coordinator.api.forms import Form, cookie_of, forget_leftovers, read_form
from coordinator.refusals import ForbiddenError, MalformedError

HEADERS = {"host": "here:1", "content-type": "application/x-www-form-urlencoded"}


def read(folder: Path, data: bytes, form: Form, csrf: str = "word", **headers: str) -> None:
    """Read a form from bytes."""
    with Body(folder) as body:
        asyncio.run(body.add(data))
        read_form(body, {**HEADERS, **headers}, csrf, form)


def parts(*entries: tuple[str, str | None, bytes]) -> bytes:
    """A multipart body of name, file name and content."""
    lines = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"'.encode()
        + (b"" if file is None else f'; filename="{file}"'.encode())
        + b"\r\n\r\n"
        + content
        + b"\r\n"
        for name, file, content in entries
    ]
    return b"".join(lines) + b"--b--\r\n"


MULTIPART = {"content-type": "multipart/form-data; boundary=b"}


def test_both_encodings_are_read(tmp_path: Path) -> None:
    """Fields come from either encoding, files from the second alone, and go with the form."""
    with Form(tmp_path) as form:
        read(tmp_path, b"csrf=word&a=1%C3%A4&b=", form)
        assert form.fields == {"csrf": "word", "a": "1ä", "b": ""}
    with Form(tmp_path) as form:
        data = parts(("csrf", None, b"word"), ("x", "d/f.bin", b"\x00" * 300_000), ("none", "", b""))
        read(tmp_path, data, form, **MULTIPART)
        assert form.fields == {"csrf": "word"}
        assert form.files["d/f.bin"].read_bytes() == b"\x00" * 300_000
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "csrf", "headers"),
    [
        (b"a=1", "word", {}),
        (b"csrf=other", "word", {}),
        (b"csrf=", "", {}),
        (b"csrf=word", "word", {"origin": "https://elsewhere.example"}),
        (parts(("f", "early", b"x"), ("csrf", None, b"word")), "word", MULTIPART),
        (parts(("a", None, b"x")), "word", MULTIPART),
    ],
)
def test_what_no_page_of_ours_sent_is_refused(
    tmp_path: Path, data: bytes, csrf: str, headers: dict[str, str]
) -> None:
    """A form without its page's word, with another, with files before it, or from another site is not taken."""
    with Form(tmp_path) as form:
        with pytest.raises(ForbiddenError, match="load the page again"):
            read(tmp_path, data, form, csrf, **headers)
        assert form.files == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"{}", {"content-type": "application/json"}),
        (b"\xff=\xff", {}),
        (b"no multipart", MULTIPART),
        (parts(("csrf", None, b"word"))[:-4], MULTIPART),
        (parts(("csrf", None, b"word")), {"content-type": "multipart/form-data"}),
        (parts(("csrf", None, b"word"), ("a", None, b"x" * ((1 << 20) + 1))), MULTIPART),
        (b"&".join(b"a=1" for _ in range(2001)), {}),
    ],
)
def test_what_is_no_form_is_refused(tmp_path: Path, data: bytes, headers: dict[str, str]) -> None:
    """Other kinds, damaged bodies and forms over their bounds are refused in one line."""
    with Form(tmp_path) as form, pytest.raises(MalformedError, match=r"form"):
        read(tmp_path, data, form, **headers)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Folders of forms are removed at the next start, and nothing else."""
    form = Form(tmp_path)
    form.new_file("a").write_text("x")
    (tmp_path / "other").mkdir()
    forget_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_cookies_are_read_by_name() -> None:
    """A cookie is found among others; without it, or where the header is damaged, there is none."""
    assert cookie_of({"cookie": "a=1; b=2"}, "b") == "2"
    assert cookie_of({}, "b") == ""
    assert cookie_of({"cookie": "a=1;;;=;\x00"}, "b") == ""
