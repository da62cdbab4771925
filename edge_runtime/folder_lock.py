"""A folder that one process at a time may write: the lock holds as long as the process, and says which one it is."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from edge_runtime.errors import ConfigError


def claim_folder(path: Path, *, what: str, who: str) -> BinaryIO:
    """Lock a file for this process, and write the process's number into it.

    Args:
        path: lock file, made if missing; it stays when the lock is given up.
        what: words for the folder in an error.
        who: words for the process that holds it.

    Returns:
        The open file. Closing it gives the folder up, and so does the end of the process, however it ends.

    Raises:
        ConfigError: another process holds it; names that process.
        OSError: the file cannot be written.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(file)
        file.close()
        raise ConfigError(
            f"another {who} uses {what}{holder}; stop it, or give each a folder of its own"
        ) from error
    except OSError:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode("ascii"))
    file.flush()
    return file


def _holder(file: BinaryIO) -> str:
    """The number of the process that holds a lock, in words; empty in the moment before it is written."""
    file.seek(0)
    text = file.read(32).strip()
    return f" (process {int(text)})" if text.isdigit() else ""
