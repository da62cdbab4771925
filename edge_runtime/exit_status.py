"""What the three command lines share: how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from edge_runtime.errors import EdgeError, ResourceError
from edge_runtime.trouble import passing_trouble

#: Exit code with which shells report a program that SIGINT ended.
INTERRUPTED = 130


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command; an error ends it with one line on standard error and the error's exit code."""
    try:
        return command()
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {_in_words(error)}\n")
        return EdgeError.exit_code if passing_trouble(error) is None else ResourceError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _in_words(error: OSError) -> str:
    """What the system refused, and of which file."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return (
        f"cannot use {error.filename}: {error.strerror}; check the path, who may use it, and the free space"
    )
