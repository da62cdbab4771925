"""Label sets as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from export.model.labels import read_labels


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (b'["billing", "delivery"]', ("billing", "delivery")),
        (b'\xef\xbb\xbf["billing", "delivery"]', ("billing", "delivery")),
        (b"[0, 1, 2]", ("0", "1", "2")),
    ],
)
def test_a_label_set_is_read(tmp_path: Path, data: bytes, labels: tuple[str, ...]) -> None:
    """Strings are labels, a byte order mark is none, and whole numbers are the labels written like them."""
    path = tmp_path / "labels.json"
    path.write_bytes(data)
    assert read_labels(path) == labels


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"billing\ndelivery\n", "is not JSON"),
        (b'{"billing": 0, "delivery": 1}', "holds a JSON object; write the labels alone"),
        (b'"billing"', "must hold a JSON array"),
        (b'["billing", 1]', "labels of one kind"),
        (b"[true, false]", "labels of one kind"),
        (b"[0.5, 1.5]", "labels of one kind"),
        (b'["billing", " "]', "label 2 of .* is empty"),
        (b'["billing"]', "holds 1 labels; a classifier needs at least two"),
        (b"[]", "holds 0 labels"),
        (b'["billing", "billing", "delivery"]', "holds 1 labels more than once, the first is 'billing'"),
        (b'["d\xe9lai", "delivery"]', "is not UTF-8"),
        ('["billing", "delivery"]'.encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        (b"\x1f\x8b\x08\x00", "is compressed by gzip; unpack it"),
        (b"<!DOCTYPE html>", "is a web page, not the file itself"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_label_set_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    """Anything else is one line with its cause."""
    path = tmp_path / "labels.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why) as caught:
        read_labels(path)
    assert "\n" not in str(caught.value)


def test_a_missing_label_set_is_named(tmp_path: Path) -> None:
    """A path that leads nowhere is a ConfigError."""
    with pytest.raises(ConfigError, match=r"cannot read the label set .*none\.json: No such file"):
        read_labels(tmp_path / "none.json")
