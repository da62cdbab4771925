"""How a worker's process ends: each kind of error becomes one report and one exit code."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import msgspec
import pytest

from edge_runtime.errors import CapExceededError, DataError
from edge_runtime.worker.ending import end_of
from edge_runtime.worker.jobs import FAILURE_EXIT_CODE, Failure


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("line 3 is empty"), "DataError"),
        (CapExceededError("9 over 5", required_bytes=9, cap_bytes=5), "CapExceededError"),
        (MemoryError("no block"), "OutOfMemoryError"),
        (RuntimeError("Failed to allocate memory for requested buffer"), "OutOfMemoryError"),
    ],
)
def test_an_error_raised_on_purpose_is_reported(monkeypatch, error: Exception, kind: str) -> None:
    """Its class and words go to standard output, and the exit code says that they are there."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=output))
    assert end_of(lambda: _raise(error)) == FAILURE_EXIT_CODE
    failure = msgspec.json.decode(output.getvalue(), type=Failure)
    assert failure.kind == kind
    assert str(error) in failure.message
    assert failure.required_bytes == getattr(error, "required_bytes", 0)


def test_any_other_error_is_a_crash() -> None:
    """What nobody raised on purpose keeps its traceback."""
    with pytest.raises(RuntimeError, match="a mistake"):
        end_of(lambda: _raise(RuntimeError("a mistake")))


def test_work_that_is_done_ends_well() -> None:
    """Nothing raised means exit code 0."""
    assert end_of(lambda: None) == 0
