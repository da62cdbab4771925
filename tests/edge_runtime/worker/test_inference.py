"""Lines of a pipe as requests: bounded, waited for, and looked at without waiting while a text is generated."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from edge_runtime.errors import WorkerError
from edge_runtime.inference.requests import ClassifyText, StopGenerating
from edge_runtime.worker import inference
from edge_runtime.worker.inference import RequestLines


@pytest.fixture
def pipe() -> Iterator[tuple[RequestLines, int]]:
    """Requests from a pipe, and its other end."""
    read, write = os.pipe()
    yield RequestLines(read), write
    os.close(read)


def test_requests_come_in_order_however_they_are_cut(pipe) -> None:
    """Lines that arrive in pieces, or several at once, are one request each; the end is the end."""
    lines, write = pipe
    data = b"".join(msgspec.json.encode(ClassifyText(text)) + b"\n" for text in ("a\n", "b"))
    os.write(write, data[:5])
    os.write(write, data[5:])
    os.close(write)
    assert [lines.next(), lines.next(), lines.next()] == [ClassifyText("a\n"), ClassifyText("b"), None]


def test_a_stop_is_noticed_without_waiting(pipe) -> None:
    """Nothing there means go on; a stop is taken; the end of the input is one, too."""
    lines, write = pipe
    assert not lines.stop_waits()
    os.write(write, msgspec.json.encode(StopGenerating()) + b"\n")
    assert lines.stop_waits()
    assert not lines.stop_waits()
    os.close(write)
    assert lines.stop_waits()


def test_what_breaks_the_contract_ends_the_worker(pipe, monkeypatch) -> None:
    """A malformed line, a request in mid-text and a line without end are told; nothing of them is quoted."""
    lines, write = pipe
    os.write(write, b'{"type":"classify","text":7}\n')
    with pytest.raises(WorkerError, match="malformed request: Expected `str`"):
        lines.next()
    for line in (b'{"type":"classify","text":"\xff"}', b'{"other":' + b"[" * 50_000):
        os.write(write, line + b"\n")
        with pytest.raises(WorkerError, match="malformed request: "):
            lines.next()
    os.write(write, msgspec.json.encode(ClassifyText("periwinkle")) + b"\n")
    with pytest.raises(WorkerError, match="before the last one was answered"):
        lines.stop_waits()
    monkeypatch.setattr(inference, "MAX_REQUEST_BYTES", 10)
    os.write(write, b"x" * 30)
    with pytest.raises(WorkerError, match="more than 10 bytes"):
        lines.next()
    os.close(write)
