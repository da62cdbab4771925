"""What a process really takes: its high-water mark, and of what kinds of memory that is made.

VmHWM counts resident pages and can be set back, so that each phase has a mark of its own. The kernel's charge is a
second and independent figure, read by the parent (``edge_runtime.memory.enforcement``). Reading /proc/PID/status costs
0.2 to 0.3 ms for a worker of 150 MB; smaps_rollup costs 1.5 ms, because it walks the page tables.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


class Meter:
    """High-water marks of this process, phase by phase.

    Args:
        announce: function that is called with the name of each phase as it begins; None calls nothing.

    Attributes:
        floor_bytes: resident memory when the meter was made: interpreter and libraries.
        phases: high-water mark of each phase that has ended; where the kernel does not let the mark be set back, the
            largest mark until then.
        resets: whether the kernel lets the mark be set back.
    """

    def __init__(self, announce: Callable[[str], None] | None = None) -> None:
        self._announce = announce
        self.floor_bytes = status_bytes("VmRSS")
        self.phases: dict[str, int] = {}
        self.resets = _reset_high_water()
        self._phase = "start"

    def enter(self, phase: str) -> None:
        """End the present phase and begin another."""
        self.close()
        self._phase = phase
        if self._announce:
            self._announce(phase)
        if self.resets:
            _reset_high_water()

    def close(self) -> None:
        """Record the present phase's mark."""
        mark = status_bytes("VmHWM")
        self.phases[self._phase] = max(mark, self.phases.get(self._phase, 0))

    @property
    def peak_bytes(self) -> int:
        """Largest mark of all phases so far."""
        return max([*self.phases.values(), status_bytes("VmHWM")])


def status_bytes(field: str) -> int:
    """A size from /proc/self/status in bytes; 0 where the system does not tell it."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        log.warning("no /proc/self/status here: memory is not measured")
    return 0


@dataclass(frozen=True)
class ProcessMemory:
    """Sizes of one process in bytes.

    Attributes:
        resident_bytes: pages in memory, the sum of the next two.
        anonymous_bytes: the process's own pages.
        file_bytes: pages of mapped files and shared memory.
        data_bytes: private writable mappings, touched or not, which RLIMIT_DATA counts.
    """

    resident_bytes: int
    anonymous_bytes: int
    file_bytes: int
    data_bytes: int


def read_memory(process_id: int) -> ProcessMemory | None:
    """Present sizes of a process; None if it has ended or the system does not tell them."""
    sizes = {}
    try:
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in {"VmData", "RssAnon", "RssFile", "RssShmem"}:
                sizes[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        return None
    if "VmData" not in sizes:  # a zombie has no memory any more
        return None
    anonymous_bytes = sizes.get("RssAnon", 0)
    file_bytes = sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)
    return ProcessMemory(anonymous_bytes + file_bytes, anonymous_bytes, file_bytes, sizes["VmData"])


def mapped_bytes(folders: Sequence[Path]) -> tuple[int, int]:
    """Resident bytes of this process's mapped files: those below any of ``folders``, and all others.

    This reads /proc/self/smaps, which takes some milliseconds.
    """
    prefixes = tuple(f"{folder.resolve()}/" for folder in folders)
    inside = others = 0
    path = ""
    try:
        with Path("/proc/self/smaps").open() as lines:
            for line in lines:
                words = line.split()
                if words[0] in ("Rss:", "Anonymous:"):
                    # A library's pages that were written to are anonymous, though they lie under its name.
                    size = int(words[1]) * (1024 if words[0] == "Rss:" else -1024)
                    if path.startswith(prefixes):
                        inside += size
                    elif path.startswith("/"):
                        others += size
                elif not words[0].endswith(":"):  # the head of a mapping, its path last if it has one
                    path = words[5] if len(words) > 5 else ""
    except OSError:
        log.warning("no /proc/self/smaps here: mapped files are not measured")
    return inside, others


def proportional_bytes() -> tuple[int, int]:
    """Anonymous and file-backed memory of this process, each page divided by the number of processes that hold it.

    This reads /proc/self/smaps_rollup, about 1.5 ms; (0, 0) where the kernel (before 5.4) does not tell the two apart.
    """
    sizes = {"Pss_Anon": 0, "Pss_File": 0}
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        log.info("event=smaps_rollup_missing effect=no_proportional_set_size")
    return sizes["Pss_Anon"], sizes["Pss_File"]


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER)
    except OSError:
        return False
    return True
