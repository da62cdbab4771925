"""The cap, enforced by the kernel: the worker starts in a memory control group of its own.

The best of these that the machine offers enforces the cap:

- ``cgroup_v2``, ``cgroup_v1``: the kernel charges every page to the group and kills the worker at the cap.
- ``rlimit``: the kernel refuses private writable mappings (RLIMIT_DATA). More is mapped than is resident, so the limit
  follows the worker: see :meth:`MemoryLimit.follow`.
- ``none``: this system has none of them.

Reasons and figures: docs/decisions/0010-enforcement.md.
"""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_runtime.log import warn
from edge_runtime.memory.cgroups import (
    Hierarchies,
    make_group,
    parent_v1,
    parent_v2,
    remove_group,
    remove_stale,
)
from edge_runtime.memory.meter import ProcessMemory

EnforcedBy = Literal["cgroup_v2", "cgroup_v1", "rlimit", "none"]

#: Shell script that enters the group named first and then becomes the program, so that all its memory is charged there.
ENTER = 'echo $$ > "$0" && exec "$@"'
#: Memory that RLIMIT_DATA allows beyond the cap. At the start it covers mappings that libraries never touch, mostly
#: OpenBLAS's 42 MB for each core; later, stacks of 8 MB each that threads may map between two looks.
START_SLACK_BYTES = (1 + (os.cpu_count() or 1)) * (64 << 20)
LATER_SLACK_BYTES = 32 << 20
#: Words by which onnxruntime reports a refused allocation, since its exceptions have no class in common.
REFUSED_MEMORY_WORDS = ("bad_alloc", "Failed to allocate memory", "Cannot allocate memory")


@dataclass(frozen=True)
class MemoryLimit:
    """What holds one program to its memory cap.

    Attributes:
        enforced_by: means of enforcement.
        cap_bytes: memory that the program may take; None where it is only measured.
        group: folder of the control group; None without one.
        note: reason why no control group enforces the cap; empty if one does.
    """

    enforced_by: EnforcedBy
    cap_bytes: int | None
    group: Path | None = None
    note: str = ""

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that starts a program within its group, so that its very first page is charged there."""
        return ["sh", "-c", ENTER, str(self.group / "cgroup.procs"), *command] if self.group else [*command]

    def follow(self, process_id: int, memory: ProcessMemory | None = None) -> None:
        """Adapt RLIMIT_DATA to what a running program has mapped. Under other limits this does nothing.

        The limit is the cap, plus the memory that is mapped but not resident, plus a slack.

        Args:
            process_id: id of the process.
            memory: present sizes of the process; None at the start, where the slack is :data:`START_SLACK_BYTES`
                instead of :data:`LATER_SLACK_BYTES`.
        """
        if self.enforced_by != "rlimit" or self.cap_bytes is None:
            return
        limit_bytes = self.cap_bytes + START_SLACK_BYTES
        if memory is not None:
            untouched_bytes = max(0, memory.data_bytes - memory.resident_bytes)
            limit_bytes = self.cap_bytes + untouched_bytes + LATER_SLACK_BYTES
        try:
            _, hard = resource.prlimit(process_id, resource.RLIMIT_DATA)
            soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
            resource.prlimit(process_id, resource.RLIMIT_DATA, (soft, hard))
        except ProcessLookupError:  # it has ended
            return

    def peak_bytes(self) -> int | None:
        """Largest charge of the whole group, including files that it was the first to read; None without a group.

        Version 2 tells it from Linux 5.19 on.
        """
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if self.group and (self.group / name).is_file():
                return int((self.group / name).read_text())
        return None

    def killed_for_memory(self) -> bool:
        """Whether the kernel killed a process of this group for memory.

        Version 1 counts kills from Linux 4.13 on; before that, only hits of the limit are known, and they count here.
        """
        if self.group is None:
            return False
        for name in ("memory.events", "memory.oom_control"):
            kills = _counter(self.group / name, "oom_kill")
            if kills is not None:
                return kills > 0
        failures = self.group / "memory.failcnt"
        return failures.is_file() and int(failures.read_text()) > 0


def make_memory_limit(cap_bytes: int | None, tree: Hierarchies | None = None) -> MemoryLimit:
    """A memory limit by the best means at hand; pass it to :func:`remove_memory_limit` at the end.

    Args:
        cap_bytes: memory that the program may take; None only measures it.
        tree: place of the control groups; None takes the machine's own.
    """
    tree = tree or Hierarchies()
    reasons = []
    makers: tuple[tuple[EnforcedBy, Callable[[Hierarchies], Path]], ...] = (
        ("cgroup_v2", parent_v2),
        ("cgroup_v1", parent_v1),
    )
    for enforced_by, parent_of in makers:
        try:
            parent = parent_of(tree)
            remove_stale(parent, tree)
            return MemoryLimit(
                enforced_by,
                cap_bytes,
                make_group(parent, cap_bytes, tree, unified=enforced_by == "cgroup_v2"),
            )
        except OSError as error:
            reasons.append(f"{enforced_by}: {error.strerror or error}")
    note = f"no memory control group ({'; '.join(reasons)})"
    enforced_by = "rlimit" if cap_bytes is not None and hasattr(resource, "prlimit") else "none"
    if cap_bytes is not None:
        _warn_once(enforced_by, note)
    return MemoryLimit(enforced_by, cap_bytes, note=note)


def remove_memory_limit(memory_limit: MemoryLimit, tree: Hierarchies | None = None) -> None:
    """Remove the group of a memory limit, with any process still in it."""
    if memory_limit.group:
        remove_group(memory_limit.group, tree or Hierarchies())


@contextmanager
def memory_limit(cap_bytes: int | None, tree: Hierarchies | None = None) -> Iterator[MemoryLimit]:
    """A memory limit for the length of a ``with`` block; see :func:`make_memory_limit`."""
    memory_limit = make_memory_limit(cap_bytes, tree)
    try:
        yield memory_limit
    finally:
        remove_memory_limit(memory_limit, tree)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an exception, or one that caused it, says that an allocation failed.

    Python and numpy raise MemoryError; onnxruntime raises errors that only their words tell apart.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in REFUSED_MEMORY_WORDS):
            return True
        cause = cause.__cause__
    return False


def _counter(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)


@functools.cache
def _warn_once(enforced_by: EnforcedBy, note: str) -> None:
    warn("cap_enforcement", enforced_by=enforced_by, note=note)
