"""How a worker process's end is read, with processes that end in every way."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from edge_runtime import errors
from edge_runtime.errors import CapExceededError, DataError, EdgeError, RefusedError, WorkerError
from edge_runtime.jobs import (
    FAILURE_EXIT_CODE,
    EvaluateJob,
    EvaluateOutcome,
    Failure,
    Job,
    TrainJob,
    describe_failure,
    finish_worker,
)
from tests.edge_runtime.golden.tangents import TASK


def process_that(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


def failing_with(failure: Failure) -> subprocess.Popen[bytes]:
    data = msgspec.json.encode(failure)
    return process_that(f"import sys; sys.stdout.buffer.write({data!r}); sys.exit({FAILURE_EXIT_CODE})")


def test_jobs_survive_the_way_to_the_worker() -> None:
    """Both kinds of job decode to what was encoded."""
    jobs = [
        TrainJob("p", "k", "s", "d", "c", TASK, 1, 2),
        EvaluateJob("p", "k", "s", "d", 64, 1),
    ]
    for job in jobs:
        assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job


@pytest.mark.parametrize("kind", ["DataError", "PackageError", "SliceError", "SignatureError", "WorkerError"])
def test_an_error_comes_back_as_its_own_class(kind: str) -> None:
    """The class the worker raised is raised here, with its message."""
    with pytest.raises(EdgeError) as caught:
        finish_worker(failing_with(Failure(kind, "line 3")), EvaluateOutcome)
    assert type(caught.value) is getattr(errors, kind)
    assert str(caught.value) == "line 3"


def test_a_refused_cap_comes_back_with_both_figures() -> None:
    """A CapExceededError keeps what was needed and what was granted."""
    failure = describe_failure(CapExceededError("too small", required_bytes=300, cap_bytes=200))
    with pytest.raises(CapExceededError, match="too small") as caught:
        finish_worker(failing_with(failure), EvaluateOutcome)
    assert (caught.value.required_bytes, caught.value.cap_bytes) == (300, 200)


@pytest.mark.parametrize("kind", ["Nothing", "RefusedError", "__name__", "annotations", "Exception"])
def test_a_class_that_is_not_ours_comes_back_as_a_worker_error(kind: str) -> None:
    """Only error classes that need nothing but a message are rebuilt by name."""
    with pytest.raises(WorkerError, match="why") as caught:
        finish_worker(failing_with(Failure(kind, "why")), EvaluateOutcome)
    assert type(caught.value) is WorkerError


def test_describing_an_error_keeps_class_and_message() -> None:
    """Messages are cut to the wire's limit, figures are zero where an error has none."""
    assert describe_failure(DataError("x" * 5000)) == Failure("DataError", "x" * 2000)
    assert describe_failure(RefusedError("no", code="stale")).kind == "RefusedError"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('nonsense')", "cannot be read"),
        ("print('{}')", "cannot be read"),
        (f"import sys; print('nonsense'); sys.exit({FAILURE_EXIT_CODE})", "cannot be read"),
        ("import sys; sys.exit(1)", "exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL; out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed by SIGTERM$"),
    ],
)
def test_every_other_end_is_a_worker_error(program: str, message: str) -> None:
    """Nonsense, an unknown exit code and a signal are WorkerErrors that say which."""
    with pytest.raises(WorkerError, match=message):
        finish_worker(process_that(program), EvaluateOutcome)


def test_a_worker_past_its_time_is_stopped() -> None:
    """A worker that runs past its limit is killed, and the error gives the limit."""
    process = process_that("import time; time.sleep(60)")
    with pytest.raises(WorkerError, match="limit of 1 s"):
        finish_worker(process, EvaluateOutcome, timeout_s=1)
    assert process.poll() is not None
