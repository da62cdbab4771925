"""Forms of pages, read within bounds: fields in memory, files in a folder that goes with the request.

A form carries a word that only its own page knows (``csrf``): a page of somebody else's, to whose request the browser
adds the cookie, does not know it. It stands first, so that nothing of such a page's files is kept.
"""

from __future__ import annotations

import hmac
import shutil
import tempfile
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from coordinator.api.body import Body
from coordinator.refusals import ForbiddenError, MalformedError

#: Most fields and files of a form, and most bytes of its fields together.
MOST_PARTS = 2_000
MOST_FIELD_BYTES = 1 << 20
#: How folders of forms begin; those that a killed process left are removed at the next start.
FOLDER_PREFIX = "form-"


class Form:
    """A form that was sent. Use as a context: its files go with it.

    Args:
        incoming: folder for its files.

    Attributes:
        fields: values of its fields; the last of a name counts.
        files: its files, by the names that the browser gave them.
    """

    def __init__(self, incoming: Path) -> None:
        self._incoming = incoming
        self._folder: Path | None = None
        self.fields: dict[str, str] = {}
        self.files: dict[str, Path] = {}

    def new_file(self, name: str) -> Path:
        """A place for a file."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=self._incoming))
        self.files[name] = self._folder / str(len(self.files))
        return self.files[name]

    def __enter__(self) -> Form:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def forget_leftovers(incoming: Path) -> None:
    """Remove the files of forms that a killed process left."""
    for folder in incoming.glob(f"{FOLDER_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def cookie_of(headers: dict[str, str], name: str) -> str:
    """What a cookie holds; empty without it."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def read_form(body: Body, headers: dict[str, str], csrf: str, form: Form) -> None:
    """Read a form of either encoding.

    Args:
        body: the request's body.
        headers: the request's headers.
        csrf: word that the form must carry; an empty one is carried by none.
        form: empty form that takes it.

    Raises:
        ForbiddenError: ``csrf``, it was not sent by a page of ours.
        MalformedError: ``malformed``, it is no form.
        OSError: the disk is full.
    """
    origin = headers.get("origin")
    if origin not in (None, "null") and urlsplit(origin).netloc != headers.get("host", ""):
        raise _foreign()
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind == "multipart/form-data":
        try:
            _read_parts(body, options.get("boundary", ""), csrf, form)
        except (MultipartError, ValueError) as error:
            raise MalformedError("malformed", f"the form cannot be read: {error}") from error
    elif kind == "application/x-www-form-urlencoded" and not body.is_large:
        try:
            pairs = parse_qsl(
                body.read().decode("utf-8"),
                keep_blank_values=True,
                max_num_fields=MOST_PARTS,
                errors="strict",
            )
        except ValueError as error:
            raise MalformedError("malformed", f"the form cannot be read: {error}") from error
        form.fields = dict(pairs)
    else:
        raise MalformedError("malformed", "the body is no form of a page")
    _check(form, csrf)


def _read_parts(body: Body, boundary: str, csrf: str, form: Form) -> None:
    parser = PushMultipartParser(boundary, max_segment_count=MOST_PARTS)
    left = MOST_FIELD_BYTES
    with parser:
        part: MultipartSegment | None = None
        value = bytearray()
        file = None
        try:
            for piece in body.pieces():
                for event in parser.parse(piece):
                    if isinstance(event, MultipartSegment):
                        part, value = event, bytearray()
                        if part.filename:
                            _check(form, csrf)
                            file = form.new_file(part.filename).open("wb")
                    elif event is None:
                        if file is not None:
                            file.close()
                            file = None
                        elif part is not None and not (part.filename == "" or part.filename):
                            form.fields[part.name] = value.decode("utf-8")
                    elif file is not None:
                        file.write(event)
                    else:
                        left -= len(event)
                        if left < 0:
                            raise MalformedError(
                                "malformed", f"the form's fields exceed {MOST_FIELD_BYTES} bytes"
                            )
                        value += event
        finally:
            if file is not None:
                file.close()


def _check(form: Form, csrf: str) -> None:
    if not csrf or not hmac.compare_digest(form.fields.get("csrf", "").encode(), csrf.encode()):
        raise _foreign()


def _foreign() -> ForbiddenError:
    return ForbiddenError(
        "csrf",
        "the form was not sent from a page of this session, so nothing was done; load the page again and repeat it",
    )
