"""What a process really takes: high-water mark, its split, and the kernel's own charge.

Two independent figures where the machine offers them: VmHWM counts resident pages of
this process, the cgroup's peak counts what the kernel charged for it. VmHWM can be set back, so that each
phase has its own. Reading /proc costs well under a millisecond and no memory to speak of.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


class Meter:
    """High-water marks of this process, phase by phase.

    Where the kernel does not allow the mark to be set back, ``phases`` holds the running maximum instead and
    ``resets`` is False.
    """

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.resets = _reset_high_water()
        self._phase = "start"

    def enter(self, phase: str) -> None:
        """Close the current phase and open another."""
        self.close()
        self._phase = phase
        if self.resets:
            _reset_high_water()

    def close(self) -> None:
        """Record the current phase's mark."""
        mark = status_bytes("VmHWM")
        self.phases[self._phase] = max(mark, self.phases.get(self._phase, 0))

    @property
    def peak_bytes(self) -> int:
        """Largest mark over all phases so far."""
        return max([*self.phases.values(), status_bytes("VmHWM")])


def status_bytes(field: str) -> int:
    """A size from /proc/self/status in bytes, 0 where the system does not offer it."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        log.warning("no /proc/self/status here: memory is not measured")
    return 0


def cgroup_peak_bytes() -> int | None:
    """The kernel's peak charge for this process's memory cgroup, or None if it shares it with others.

    Version 2 offers ``memory.peak``, version 1 ``memory.max_usage_in_bytes``.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for root, file in (
            ("/sys/fs/cgroup/memory", "memory.max_usage_in_bytes"),
            ("/sys/fs/cgroup", "memory.peak"),
        ):
            group = Path(root) / path.lstrip("/")
            if controllers in ("", "memory") and (group / file).is_file() and _is_alone(group):
                return int((group / file).read_text())
    return None


def _is_alone(group: Path) -> bool:
    """Whether this process is the only one charged to a cgroup."""
    try:
        return (group / "cgroup.procs").read_text().split() == [str(os.getpid())]
    except OSError:
        return False


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER)
    except OSError:
        return False
    return True
