"""Why a data file cannot be read: the cause and a cure, in words that quote nothing of it."""

from __future__ import annotations

import re

#: What a file is by its first bytes, and what to do with it; the longer of two beginnings comes first.
_FORMATS = {
    b"\xff\xfe\x00\x00": "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8",
    b"\x00\x00\xfe\xff": "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8",
    b"{\x00": "is UTF-16, not UTF-8; convert it: iconv -f UTF-16LE -t UTF-8",
    b"\x00{": "is UTF-16, not UTF-8; convert it: iconv -f UTF-16BE -t UTF-8",
    b"\xff\xfe": "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "is compressed by gzip; unpack it: gunzip -c",
    b"(\xb5/\xfd": "is compressed by zstd; unpack it: zstd -dc",
    b"\xfd7zXZ": "is compressed by xz; unpack it: xz -dc",
    b"BZh": "is compressed by bzip2; unpack it: bzip2 -dc",
    b"PK\x03\x04": "is a ZIP archive or a spreadsheet; export its rows as JSONL, one object a line",
    b"PAR1": "is a Parquet file; export its rows as JSONL, one object a line",
    b"ARROW1": "is an Arrow file; export its rows as JSONL, one object a line",
    b"SQLite format 3": "is an SQLite database; export its rows as JSONL, one object a line",
    b"version https://git-lfs": "is what git keeps in the place of a large file, not the file; get it: git lfs pull",
    b"<!": "is a web page, not the file itself; download the file",
    b"<html": "is a web page, not the file itself; download the file",
}
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon"}
_CONTROL = re.compile(r"[\x00-\x1f]")
_NO_NUMBER = re.compile(r":\s*-?(NaN|Infinity)\s*[,}]")
_SEVERAL = re.compile(r"^\{.*\}\s*\{.*\}$", re.DOTALL)
_ESCAPED_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def other_format(data: bytes) -> str:
    """What a file is that begins like no text in UTF-8, and how to convert it."""
    return next(words for start, words in _FORMATS.items() if data.startswith(start))


def why_unreadable(data: bytes, form: str, *, first: bool) -> str:
    """Why a line is no JSON, and what to do.

    Args:
        data: bytes of the line.
        form: words for what a row must be.
        first: whether it is the file's first row, where a table has its header.
    """
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as error:
        return (
            f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8, or convert it from its "
            "encoding: iconv -f LATIN1 -t UTF-8"
        )
    causes = {
        "holds half of a surrogate pair (\\ud800 to \\udfff by itself), which is no character; write the whole "
        "character, or remove it": _has_half_a_pair(text),
        "opens a JSON value that goes on in the next line; write each row in one line": text in ("{", "["),
        "is part of a JSON array; write each row as a line of its own, without brackets and commas around it": (
            text.endswith(("},", "}]"))
        ),
        "is not JSON: it has single quotes where JSON has double ones; write the rows with a JSON library": (
            text.startswith("{'")
        ),
        "is not JSON: it has a raw control character, such as a tab, in a string; write it as an escape, such as \\t": (
            text.startswith("{") and _CONTROL.search(text) is not None
        ),
        "is not JSON: it has NaN or Infinity for a number; write null, or remove the row": (
            _NO_NUMBER.search(text) is not None
        ),
        "holds several rows; write each in a line of its own": _SEVERAL.search(text) is not None,
        "is a comment, which JSON has not; remove it": text.startswith(("#", "//")),
        f"is not JSON; it looks like a {_separator(text)}-separated table; write it as JSONL, each row {form}": (
            first and not text.startswith("{") and bool(_separator(text))
        ),
    }
    return next((cause for cause, met in causes.items() if met), f"is not JSON; it must be {form}")


def _separator(text: str) -> str:
    return next((name for sign, name in _SEPARATORS.items() if sign in text), "")


def _has_half_a_pair(text: str) -> bool:
    """Whether JSON escapes one half of a surrogate pair without the other."""
    return _ESCAPED_HALF.search(_ESCAPED_PAIR.sub("", text.replace("\\\\", ""))) is not None
