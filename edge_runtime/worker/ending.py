"""What a worker's process writes to its parent, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec
from msgspec import Struct

from edge_runtime.errors import EdgeError, OutOfMemoryError
from edge_runtime.memory.enforcement import ran_out_of_memory
from edge_runtime.worker.jobs import FAILURE_EXIT_CODE, describe_failure


def write_line(message: Struct) -> None:
    """Write a message to standard output as a line of JSON, at once."""
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def end_of(work: Callable[[], None]) -> int:
    """Do a worker's work, and return the exit code of its process.

    An error that was raised on purpose, or a refused allocation, is written as a
    :class:`~edge_runtime.worker.jobs.Failure`. Any other error is a mistake in this program, and is raised.
    """
    try:
        work()
    except Exception as error:
        if ran_out_of_memory(error):
            failure = describe_failure(OutOfMemoryError(f"{type(error).__name__}: {error}"))
        elif isinstance(error, EdgeError):
            failure = describe_failure(error)
        else:
            raise
        write_line(failure)
        return FAILURE_EXIT_CODE
    return 0
