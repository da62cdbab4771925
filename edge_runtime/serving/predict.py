"""``edge-runtime predict``: a text, or rows one after another, to lines of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from msgspec.structs import replace

from edge_runtime.data.rows import Line, read_each_row
from edge_runtime.errors import ArtefactError, DataError, DeviceError, EdgeError
from edge_runtime.inference.requests import Finished, GenerateText, Sampling
from edge_runtime.package.manifest import TaskKind
from edge_runtime.serving.lines import ErrorLine, FinishedLine, LabelLine, PieceLine, PredictLine
from edge_runtime.serving.session import InferenceSession


def predict_text(
    session: InferenceSession, task: TaskKind, text: str, sampling: Sampling
) -> Iterator[LabelLine | PieceLine | FinishedLine]:
    """What a package says of one text: a label with probabilities, or pieces of a text and its end.

    Raises:
        EdgeError: the text cannot be used, or the worker ended.
    """
    if task == "classification":
        found = session.classify(text)
        yield LabelLine(
            label=found.label,
            probabilities=found.probabilities,
            tokens=found.tokens,
            depth=found.depth,
        )
        return
    for answer in session.generate(GenerateText(text, sampling)):
        if isinstance(answer, Finished):
            yield FinishedLine(
                finished=answer.reason,
                prompt_tokens=answer.prompt_tokens,
                tokens=answer.tokens,
                seconds=round(answer.seconds, 6),
            )
        else:
            yield PieceLine(text=answer.text, tokens=answer.tokens)


def predict_rows(
    session: InferenceSession,
    task: TaskKind,
    file: BinaryIO,
    name: str,
    sampling: Sampling,
    write: Callable[[PredictLine], None],
) -> DataError | None:
    """Predict each row of a file as it comes. A row that cannot be used gets an error in its place, without its text.

    Args:
        session: worker with the package.
        task: the package's task.
        file: the rows, JSON Lines.
        name: what errors call the file.
        sampling: how texts are generated.
        write: function that takes each line of output; its ``row`` is the line's number in the file.

    Returns:
        The error to end with, if some rows could not be used or there were none.

    Raises:
        EdgeError: the file is of another format, or the worker ended.
    """
    rows, bad = 0, 0
    for number, line in read_each_row(file, name):
        rows += 1
        error = _row(session, task, line, number, sampling, write)
        if error is not None:
            bad += 1
            write(ErrorLine(row=number, error=str(error)))
    if rows == 0:
        return DataError(f"{name} is empty; it needs at least one row")
    if bad:
        return DataError(
            f"{bad} of {rows} rows of {name} could not be used; the lines with an error tell why"
        )
    return None


def _row(
    session: InferenceSession,
    task: TaskKind,
    line: Line | DataError,
    number: int,
    sampling: Sampling,
    write: Callable[[PredictLine], None],
) -> EdgeError | None:
    """Predict one row; the error, if it cannot be used."""
    if isinstance(line, DataError):
        return line
    try:
        for each in predict_text(session, task, line.text, sampling):
            write(replace(each, row=number))
    except (DeviceError, ArtefactError) as error:
        if not session.alive:
            raise
        return error
    return None


def open_rows(path: Path | None) -> tuple[BinaryIO, str]:
    """A file of rows, or standard input, and what errors call it.

    Raises:
        DataError: the file cannot be read.
    """
    if path is None:
        return sys.stdin.buffer, "standard input"
    try:
        return path.open("rb"), str(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
