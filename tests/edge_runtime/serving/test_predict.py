"""Rows to lines of JSON: each row its own answer or its own error, which quotes nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.data.rows import MAX_ROW_BYTES
from edge_runtime.errors import DataError
from edge_runtime.inference.requests import Sampling
from edge_runtime.serving.lines import PredictLine
from edge_runtime.serving.predict import predict_rows
from edge_runtime.serving.session import InferenceSession
from tests.edge_runtime.serving.conftest import publisher_key_of
from tests.edge_runtime.serving.test_lines import printed

SECRET = "periwinkle-4471"


@pytest.fixture(scope="module")
def session(language_model):
    """A worker with the language model that was written by hand."""
    with InferenceSession.start(language_model.job()) as session:
        yield session


def predict(session, data: bytes) -> tuple[list[dict], DataError | None]:
    """Lines of output for a file's bytes, and the error at its end."""
    written: list[PredictLine] = []
    error = predict_rows(
        session, "causal_lm", io.BytesIO(data), "rows", Sampling(max_tokens=2), written.append
    )
    return [printed(line) for line in written], error


def test_a_bad_row_costs_itself_alone(session) -> None:
    """Rows before and after are answered; the error has the line's number and nothing of the row."""
    rows = [
        b'{"text": "the cat"}',
        b"",
        f'{{"text": "{SECRET}", "text": "x"}}'.encode(),
        f'{{"txt": "{SECRET}"}}'.encode(),
        f"{SECRET}".encode(),
        b'{"text": "' + SECRET.encode() * (MAX_ROW_BYTES // 10) + b'"}',
        b'{"text": "' + b"home " * 40 + SECRET.encode() + b'"}',
        b'{"text": "the dog", "label": "known already"}',
    ]
    written, error = predict(session, b"\n".join(rows))
    bad = {line["row"]: line["error"] for line in written if "error" in line}
    assert sorted(bad) == [3, 4, 5, 6, 7]
    assert SECRET not in json.dumps(written)
    assert "has the column 'text' twice" in bad[3]
    assert "has no column 'text'" in bad[4]
    assert "is not JSON" in bad[5]
    assert f"more than {MAX_ROW_BYTES} bytes" in bad[6]
    assert "16 tokens or more" in bad[7]
    good = [line for line in written if line["row"] in (1, 8)]
    assert [line["finished"] for line in good if "finished" in line] == ["length", "length"]
    assert str(error) == "5 of 7 rows of rows could not be used; the lines with an error tell why"


def test_rows_come_out_as_they_come_in(session, tmp_path: Path) -> None:
    """A row is answered before the next one is there, so a pipe can be followed."""
    seen: list[int] = []

    class Pipe(io.BytesIO):
        def readline(self, *size: int) -> bytes:
            seen.append(len(written))
            return super().readline(*size)

    written: list[PredictLine] = []
    pipe = Pipe(b'{"text": "the cat"}\n{"text": "the dog"}\n')
    assert predict_rows(session, "causal_lm", pipe, "rows", Sampling(max_tokens=1), written.append) is None
    assert seen == [0, 2, 4]


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_nothing_is_an_error(session, data: bytes) -> None:
    """A file without rows is told."""
    written, error = predict(session, data)
    assert (written, str(error)) == ([], "rows is empty; it needs at least one row")


def test_another_format_is_told_at_once(session) -> None:
    """A compressed file says how to unpack it."""
    with pytest.raises(DataError, match="is compressed by gzip; unpack it"):
        predict(session, b"\x1f\x8b\x08\x00")


def run(*words: object, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """``edge-runtime predict`` as a process of its own."""
    command = [sys.executable, "-m", "edge_runtime.cli", "predict", *map(str, words)]
    return subprocess.run(command, input=given, capture_output=True, check=False, timeout=120)


def test_the_command_reads_an_argument_a_file_or_a_pipe(language_model, tmp_path: Path) -> None:
    """The same text gives the same tokens in all three ways, drawn by the same seed."""
    options = (
        *("--package", language_model.package.folder, "--publisher-key", publisher_key_of(language_model)),
        *("--prepared", language_model.prepared_folder, "--cap", "1G", "--threads", "1"),
        *("--max-tokens", "4", "--temperature", "1.5", "--top-k", "5", "--top-p", "0.95", "--seed", "3"),
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat"}\n')
    done = [
        run("the cat", *options),
        run("--data", rows, *options),
        run(*options, given=rows.read_bytes()),
    ]
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    lines = [[json.loads(line) for line in each.stdout.splitlines()] for each in done]
    texts = [["row" in line for line in found] for found in lines]
    assert texts[0] == [False] * 5
    assert texts[1] == texts[2] == [True] * 5
    for found in lines:
        for line in found:
            line.pop("row", None)
            line.pop("seconds", None)
    assert lines[0] == lines[1] == lines[2]
    assert lines[0][-1] == {"finished": "length", "prompt_tokens": 2, "tokens": 4}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("x", "--package", "p"), 11, "--package needs --cap, too"),
        (("x", "--package", "p", "--cap", "1G"), 11, "--package needs --publisher-key, too"),
        (("x", "--slices", "s"), 11, "--slices goes with --package"),
        (("x", "--data", "d"), 11, "give a text or --data, not both"),
        ((" ",), 11, "the text is empty"),
        (("x", "--top-p", "0"), 11, "--top-p: Expected `float` > 0.0"),
        (("x", "--temperature", "-1"), 11, "--temperature: Expected `float` >= 0.0"),
        (("x", "--config", "/nowhere.toml"), 11, "cannot read the configuration /nowhere.toml"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(words: tuple[str, ...], code: int, message: str) -> None:
    """Each has the exit code of its class, and says what to do."""
    done = run(*words)
    assert done.returncode == code
    assert message in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
