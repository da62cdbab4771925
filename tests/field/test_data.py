"""Data files as people brought them, each with the public thread whose situation it rebuilds."""

from __future__ import annotations

import bz2
import lzma
from pathlib import Path

import pytest

from edge_runtime.data.rows import Row, load_rows
from edge_runtime.errors import DataError

LABELS = ("billing", "delivery")
ROW = b'{"text": "the parcel is late", "label": "delivery"}\n'
READ = [Row("the parcel is late", 1)] * 2

#: Situation, thread, the file, and the rows it means or what its refusal says.
SITUATIONS = (
    ("a byte order mark", "huggingface/datasets#8241", b"\xef\xbb\xbf" + ROW + ROW, READ),
    ("a byte order mark of an editor", "pydantic/pydantic-ai#8316", b"\xef\xbb\xbf\r\n" + ROW + ROW, READ),
    ("blank lines", "wbolster/jsonlines#68", ROW + b"\n" + ROW + b"\n\n", READ),
    ("a last line without end", "wbolster/jsonlines#18", ROW + ROW.strip(), READ),
    ("lines ended as on Windows", "microsoft/graphrag#2424", (ROW + ROW).replace(b"\n", b"\r\n"), READ),
    (
        "labels as numbers",
        "ThilinaRajapakse/simpletransformers#249",
        b'{"text": "the parcel is late", "label": 1}\n' * 2,
        READ,
    ),
    (
        "labels as numbers with a point",
        "huggingface/transformers#27707",
        b'{"text": "the parcel is late", "label": 1.0}\n' * 2,
        READ,
    ),
    (
        "numbers that count from one",
        "huggingface/sentence-transformers#418",
        b'{"text": "the parcel is late", "label": 2}\n',
        "outside 0 to 1",
    ),
    (
        "a further column",
        "huggingface/datasets#3340",
        b'{"idx": 0, ' + ROW[1:] + b'{"idx": 1, ' + ROW[1:],
        READ,
    ),
    (
        "a second text",
        "huggingface/transformers#8886",
        b'{"text": "late", "text_pair": "again", "label": "delivery"}\n',
        "has a column 'text_pair' beside 'text'",
    ),
    (
        "another name for the text",
        "togethercomputer/together-python#220",
        b'{"sentence": "late", "label": "delivery"}\n',
        "rename the column 'sentence' to 'text'",
    ),
    (
        "another name for the label",
        "huggingface/transformers#8886",
        b'{"text": "late", "labels": "delivery"}\n',
        "rename the column 'labels' to 'label'",
    ),
    (
        "another encoding",
        "huggingface/datasets#6641",
        '{"text": "zurück", "label": "delivery"}\n'.encode("latin1"),
        "is not UTF-8",
    ),
    (
        "what a shell wrote",
        "wonderwhy-er/DesktopCommanderMCP#610",
        "\ufeff".encode("utf-16-le") + ROW.decode().encode("utf-16-le"),
        "is UTF-16",
    ),
    (
        "Python's own form",
        "facebookresearch/dynabench#740",
        b"{'text': 'late', 'label': 'delivery'}\n",
        "single quotes",
    ),
    ("one array", "togethercomputer/together-python#220", b"[" + ROW.strip() + b"]\n", "is a JSON array"),
    (
        "rows over several lines",
        "open-mmlab/StyleShot#18",
        b'{\n"text": "late",\n',
        "goes on in the next line",
    ),
    (
        "a table",
        "togethercomputer/together-python#220",
        b"text,label\nlate,delivery\n",
        "comma-separated table",
    ),
    (
        "half a character",
        "huggingface/transformers#8886",
        b'{"text": "late \\ud83d", "label": "delivery"}\n',
        "half of a surrogate pair",
    ),
    (
        "no text",
        "ThilinaRajapakse/simpletransformers#249",
        b'{"text": " ", "label": "delivery"}\n',
        "has an empty text",
    ),
    # Siblings, tried on the command line.
    (
        "an array of wide characters",
        "none found",
        ROW.decode().encode("utf-32"),
        "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8",
    ),
    ("UTF-16 without a mark", "none found", ROW.decode().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    ("UTF-16 of the other order", "none found", ROW.decode().encode("utf-16-be"), "iconv -f UTF-16BE"),
    ("zstd", "none found", b"\x28\xb5\x2f\xfd\x00", "is compressed by zstd; unpack it: zstd -dc"),
    ("xz", "none found", lzma.compress(ROW), "is compressed by xz; unpack it: xz -dc"),
    ("bzip2", "none found", bz2.compress(ROW), "is compressed by bzip2; unpack it: bzip2 -dc"),
    ("a pointer of git", "none found", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("a web page", "none found", b"<!DOCTYPE html><html></html>", "is a web page, not the file itself"),
    (
        "two rows in a line",
        "none found",
        ROW.strip() + b" " + ROW,
        "line 1 holds several rows; write each in",
    ),
    (
        "a tab within a text",
        "none found",
        b'{"text": "a\tb", "label": 0}\n',
        "a raw control character, such as a tab",
    ),
    (
        "no number",
        "none found",
        b'{"text": NaN, "label": "delivery"}\n',
        "NaN or Infinity for a number; write null",
    ),
    ("a comment", "none found", b"// rows\n" + ROW, "line 1 is a comment, which JSON has not; remove it"),
    (
        "a chat",
        "togethercomputer/together-python#220",
        b'{"messages": [{"role": "user", "content": "late"}]}\n',
        "has a column 'messages' and no 'text', and a row is one text: write it as one",
    ),
    (
        "a position in quotes",
        "none found",
        b'{"text": "late", "label": "1"}\n',
        "a number in quotes; without them it is a position",
    ),
    ("no text at all", "none found", b'{"text": null, "label": "delivery"}\n', "has null as its text"),
)


@pytest.mark.parametrize(
    ("data", "outcome"),
    [pytest.param(data, outcome, id=f"{name} ({thread})") for name, thread, data, outcome in SITUATIONS],
)
def test_a_situation_is_read_or_told(tmp_path: Path, data: bytes, outcome: list[Row] | str) -> None:
    """The file is read as it was meant, or refused in one line with its cause."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    if isinstance(outcome, list):
        assert load_rows(path, LABELS) == outcome
        return
    with pytest.raises(DataError) as caught:
        load_rows(path, LABELS)
    assert outcome in str(caught.value)
    assert "\n" not in str(caught.value)
