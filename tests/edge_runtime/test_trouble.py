"""Errors of the system: trouble that passes, or something that only a person can mend."""

from __future__ import annotations

import errno
import os

import pytest

from edge_runtime.errors import ConfigError, ResourceError
from edge_runtime.trouble import passing_trouble, unusable


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EDQUOT])
def test_what_the_machine_lacks_passes(number: int) -> None:
    """Full disks and tables pass, and a program that cannot start for them says so by its exit code."""
    error = OSError(number, os.strerror(number))
    assert passing_trouble(error) == os.strerror(number).lower()
    assert isinstance(unusable("the folder x", error), ResourceError)
    assert "the folder x" in str(unusable("the folder x", error))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR])
def test_what_only_a_person_can_mend_does_not(number: int) -> None:
    """A folder that is missing, closed or no folder is a matter of configuration."""
    error = OSError(number, os.strerror(number))
    assert passing_trouble(error) is None
    assert isinstance(unusable("the folder x", error), ConfigError)


def test_other_errors_are_no_trouble() -> None:
    """An error that the system did not raise is none; too little memory is."""
    assert passing_trouble(ValueError("x")) is None
    assert passing_trouble(OSError("no number")) is None
    assert passing_trouble(MemoryError()) is not None
