"""Trouble that passes: what a machine lacks for a while. It is never taken for damage, and waiting helps."""

from __future__ import annotations

import errno
import os

from edge_runtime.errors import ConfigError, DeviceError, ResourceError

#: Full disks and tables of descriptors, failing devices, a file system that went read-only, too little memory.
PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOLCK,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EROFS,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


def passing_trouble(error: BaseException) -> str | None:
    """Words for the trouble behind an error that the system raised; None if waiting would not help."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return os.strerror(error.errno).lower()
    if isinstance(error, MemoryError):
        return "out of memory"
    return None


def unusable(what: str, error: OSError) -> DeviceError:
    """The error to raise for a folder or file that a program cannot start with: does waiting help, or only a person?"""
    trouble = passing_trouble(error)
    if trouble is not None:
        return ResourceError(f"cannot use {what} now: {trouble}; make room, or wait and start again")
    return ConfigError(f"cannot use {what}: {error.strerror}")
