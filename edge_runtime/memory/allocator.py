"""How the worker keeps its own memory small: the C library's heap, and the code of its libraries."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

log = logging.getLogger(__name__)

#: mallopt(3)'s option numbers.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: madvise(2)'s advice number.
_MADV_DONTNEED = 4
_MAPS = Path("/proc/self/maps")


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensors, instead of returning each to the kernel and faulting it in again.

    This sets one heap for all threads, and thresholds above the largest tensor (mallopt(3)), because the engine
    allocates and frees tensors of the same sizes at every operator. Measured in docs/decisions/0003-engine.md.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.info("event=mallopt_missing effect=more_page_faults")
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20)):
        mallopt(option, value)


def return_freed_memory() -> None:
    """Give freed memory back to the kernel now.

    It serves to return what the tokenizer took, which is not of a size that the engine asks for.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        log.info("event=malloc_trim_missing effect=more_resident_memory")


def release_library_code() -> None:
    """Give back the pages of library code that loading has touched. Code that still runs is read in again.

    Importing and loading run through tens of megabytes of code once. Its pages are clean pages of files, mapped
    executable and never written to. Once given back, they are read again from the page cache when they are called (some
    hundred page faults). Writable and relocated pages are left alone.
    """
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        lines = _MAPS.read_text().splitlines()
    except (OSError, AttributeError):
        log.info("event=library_code_kept effect=more_resident_memory")
        return
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[1] == "r-xp" and words[5].startswith("/"):
            start, end = (int(text, 16) for text in words[0].split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
