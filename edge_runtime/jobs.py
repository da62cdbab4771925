"""Jobs for the worker process: what is asked of it, what it answers, and how it is started.

The worker is a child process because it alone loads numpy and the engine: the agent stays small, and a
worker that is killed for memory takes nothing with it. A job goes in as one JSON document on standard
input; the outcome comes back as one JSON document on standard output; logs go to standard error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TypeVar

import msgspec
from msgspec import Struct

from edge_runtime import errors
from edge_runtime.errors import EdgeError, WorkerError
from edge_runtime.messages import Bytes, Count, MemoryReport, PositiveCount, Seconds, Task, Text


class TrainJob(Struct, frozen=True, tag="train"):
    """Train one task; the change is written to ``change_path`` as safetensors."""

    package_folder: str
    publisher_key: str
    state_path: str
    data_path: str
    change_path: str
    task: Task
    cap_bytes: Bytes
    threads: PositiveCount = 1


class TrainOutcome(Struct, frozen=True):
    """What training did; see :class:`edge_runtime.messages.Result` for the fields."""

    examples: Count
    steps_applied: Count
    steps_skipped: Count
    mean_loss: float | None
    seconds: Seconds
    memory: MemoryReport


class EvaluateJob(Struct, frozen=True, tag="evaluate"):
    """Run the primal programs over a data file and count correct answers."""

    package_folder: str
    publisher_key: str
    state_path: str
    data_path: str
    sequence_limit: PositiveCount
    cap_bytes: Bytes
    threads: PositiveCount = 1


class EvaluateOutcome(Struct, frozen=True):
    """Accuracy and mean cross-entropy over all rows."""

    rows: Count
    accuracy: float
    mean_loss: float
    seconds: Seconds
    memory: MemoryReport


class Failure(Struct, frozen=True):
    """The worker's own report of an error it raised on purpose; ``kind`` is the class name."""

    kind: Text
    message: Text
    required_bytes: Bytes = 0
    cap_bytes: Bytes = 0


Job = TrainJob | EvaluateJob
OutcomeT = TypeVar("OutcomeT", TrainOutcome, EvaluateOutcome)

#: Exit code by which the worker says that standard output holds a Failure.
FAILURE_EXIT_CODE = 3


def start_worker(job: Job) -> subprocess.Popen[bytes]:
    """Start a worker on ``job`` and hand it over; pass the process to :func:`finish_worker`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    if process.stdin is None:
        raise WorkerError("the worker has no standard input")
    process.stdin.write(msgspec.json.encode(job))
    process.stdin.close()
    process.stdin = None
    return process


def finish_worker(
    process: subprocess.Popen[bytes], outcome: type[OutcomeT], timeout_s: float | None = None
) -> OutcomeT:
    """Wait for a worker and read its outcome.

    Raises:
        EdgeError: the very class the worker raised, with its message.
        WorkerError: it was killed, timed out, or answered nonsense.
    """
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise WorkerError(f"the worker ran past its limit of {timeout_s:.0f} s and was stopped") from None
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        hint = "; out of memory? grant a larger cap or assign fewer slices" if name == "SIGKILL" else ""
        raise WorkerError(f"the worker was killed by {name}{hint}")
    try:
        if process.returncode == FAILURE_EXIT_CODE:
            raise _rebuild(msgspec.json.decode(output, type=Failure))
        if process.returncode == 0:
            return msgspec.json.decode(output, type=outcome)
    except msgspec.DecodeError as error:
        raise WorkerError(f"the worker's answer cannot be read: {error}") from error
    raise WorkerError(f"the worker stopped with exit code {process.returncode}; its log tells why")


def run_worker(job: Job, outcome: type[OutcomeT], timeout_s: float | None = None) -> OutcomeT:
    """Start a worker and wait for its outcome; errors as in :func:`finish_worker`."""
    return finish_worker(start_worker(job), outcome, timeout_s)


def describe_failure(error: EdgeError) -> Failure:
    """The form in which a worker hands an error to its parent."""
    return Failure(
        kind=type(error).__name__,
        message=str(error)[:2000],
        required_bytes=getattr(error, "required_bytes", 0),
        cap_bytes=getattr(error, "cap_bytes", 0),
    )


def _rebuild(failure: Failure) -> EdgeError:
    kind = getattr(errors, failure.kind, WorkerError)
    if kind is errors.CapExceededError:
        return errors.CapExceededError(
            failure.message, required_bytes=failure.required_bytes, cap_bytes=failure.cap_bytes
        )
    if isinstance(kind, type) and issubclass(kind, EdgeError) and kind is not errors.RefusedError:
        return kind(failure.message)
    return WorkerError(failure.message)
