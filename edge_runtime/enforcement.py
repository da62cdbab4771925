"""The cap enforced by the kernel: the worker is born in a memory control group of its own.

Three judges, the best that the machine offers:

- ``cgroup_v2``, ``cgroup_v1``: the kernel charges every page to the group and kills the worker at the cap.
- ``rlimit``: the kernel refuses private writable mappings (RLIMIT_DATA). What is mapped is more than what is
  resident, so the limit follows the worker: see :meth:`Cage.follow`.
- ``none``: this system has none of them.

A group is a child of this process's own and carries the owner's process id and start time in its name, so that
what a killed owner left behind is recognised and removed. Reasons and figures: docs/decisions/0010-enforcement.md.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_runtime.journal import warn
from edge_runtime.meter import ProcessMemory

Judge = Literal["cgroup_v2", "cgroup_v1", "rlimit", "none"]

#: Worker groups are called PREFIX<owner's process id>-<owner's start time>-<anything>.
PREFIX = "edge-worker-"
#: Version 2 allows no process beside subgroups: there the agent steps into this one.
AGENT_GROUP = "edge-agent"
#: Enters the group named first, then becomes the program, so that all of its memory is charged there.
ENTER = 'echo $$ > "$0" && exec "$@"'
#: What RLIMIT_DATA allows beyond the cap. At the start: mappings that libraries never touch, mostly OpenBLAS's 42 MB
#: for each core. Later: what threads may map as their stacks, 8 MB each, between two looks.
START_SLACK_BYTES = (1 + (os.cpu_count() or 1)) * (64 << 20)
LATER_SLACK_BYTES = 32 << 20
#: How onnxruntime words a refused allocation; its exceptions for it have no class in common.
REFUSED_MEMORY_WORDS = ("bad_alloc", "Failed to allocate memory", "Cannot allocate memory")
#: The kernel may still be letting go of a group's last process.
REMOVE_TRIES, REMOVE_PAUSE_S = 100, 0.02


@dataclass(frozen=True)
class Hierarchies:
    """Where the kernel shows control groups; tests name a tree of plain folders instead.

    Attributes:
        v2: mount point of the unified hierarchy.
        v1: mount point of version 1's memory controller.
        membership: the file that tells this process's groups.
        remove: removes one group; the kernel's own files in it do not count as content.
    """

    v2: Path = Path("/sys/fs/cgroup")
    v1: Path = Path("/sys/fs/cgroup/memory")
    membership: Path = Path("/proc/self/cgroup")
    remove: Callable[[Path], None] = Path.rmdir


@dataclass(frozen=True)
class Cage:
    """What holds one program to ``cap_bytes`` (None: it is only measured).

    Attributes:
        judge: who enforces.
        note: why no control group does, empty if one does.
        group: the control group's folder, if there is one.
    """

    judge: Judge
    cap_bytes: int | None
    group: Path | None = None
    note: str = ""

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` such that the program is in its group before its own first page."""
        return ["sh", "-c", ENTER, str(self.group / "cgroup.procs"), *command] if self.group else [*command]

    def follow(self, process_id: int, memory: ProcessMemory | None = None) -> None:
        """Let a program under RLIMIT_DATA map what it may still take; others need no following.

        Allowed are the cap, what is mapped and not resident, and a slack. Without ``memory`` (at the start) the
        slack is :data:`START_SLACK_BYTES`, later :data:`LATER_SLACK_BYTES`.
        """
        if self.judge != "rlimit" or self.cap_bytes is None:
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
        """The largest charge of the whole group, files it was first to read included; None without a group.

        Version 2 offers it from Linux 5.19.
        """
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            if self.group and (self.group / name).is_file():
                return int((self.group / name).read_text())
        return None

    def killed_for_memory(self) -> bool:
        """Whether the kernel killed in this group for memory.

        Version 1 counts kills from Linux 4.13; before, that the limit was hit is all there is to go by.
        """
        if self.group is None:
            return False
        for name in ("memory.events", "memory.oom_control"):
            kills = _counter(self.group / name, "oom_kill")
            if kills is not None:
                return kills > 0
        failures = self.group / "memory.failcnt"
        return failures.is_file() and int(failures.read_text()) > 0


def make_cage(cap_bytes: int | None, tree: Hierarchies | None = None) -> Cage:
    """A cage by the best judge that can be had; pass it to :func:`remove_cage` at the end.

    Args:
        cap_bytes: what the program may take; None to measure it only.
        tree: where control groups are, the machine's own by default.
    """
    tree = tree or Hierarchies()
    reasons = []
    makers: tuple[tuple[Judge, Callable[[Hierarchies], Path]], ...] = (
        ("cgroup_v2", _parent_v2),
        ("cgroup_v1", _parent_v1),
    )
    for judge, parent_of in makers:
        try:
            parent = parent_of(tree)
            _remove_stale(parent, tree)
            return Cage(judge, cap_bytes, _make_group(parent, judge, cap_bytes, tree))
        except OSError as error:
            reasons.append(f"{judge}: {error.strerror or error}")
    note = f"no memory control group ({'; '.join(reasons)})"
    judge = "rlimit" if cap_bytes is not None and hasattr(resource, "prlimit") else "none"
    if cap_bytes is not None:
        _warn_once(judge, note)
    return Cage(judge, cap_bytes, note=note)


def remove_cage(cage: Cage, tree: Hierarchies | None = None) -> None:
    """Remove a cage's group, and whatever still runs in it."""
    if cage.group:
        _remove(cage.group, tree or Hierarchies())


@contextmanager
def memory_limit(cap_bytes: int | None, tree: Hierarchies | None = None) -> Iterator[Cage]:
    """A cage for the time of a ``with`` block; see :func:`make_cage`."""
    cage = make_cage(cap_bytes, tree)
    try:
        yield cage
    finally:
        remove_cage(cage, tree)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an exception, or one it was raised from, says that an allocation failed.

    Python and numpy raise MemoryError, onnxruntime errors that are told by their words alone.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in REFUSED_MEMORY_WORDS):
            return True
        cause = cause.__cause__
    return False


def _parent_v2(tree: Hierarchies) -> Path:
    """This process's own group, ready to have subgroups with a memory limit.

    Only a group with the controller and without processes may have them. So the agent moves itself into a
    subgroup first, if it is alone where it is: a service whose unit delegates (``Delegate=memory``).

    Raises:
        OSError: the controller is absent, or the group is not this process's to divide.
    """
    own = tree.v2 / _membership(tree, "").lstrip("/")
    base = own.parent if own.name == AGENT_GROUP else own
    if not (base / "cgroup.controllers").is_file():
        raise FileNotFoundError("not mounted")
    if "memory" not in (base / "cgroup.controllers").read_text().split():
        raise OSError("the memory controller is not delegated to this process's group")
    control = base / "cgroup.subtree_control"
    if "memory" in control.read_text().split():
        return base
    # The root of the whole machine has no type, and may hold processes beside subgroups.
    if (base / "cgroup.type").is_file():
        inside = (base / "cgroup.procs").read_text().split()
        if set(inside) - {str(os.getpid())}:
            raise OSError(
                "other processes share this process's group; run it as a service with Delegate=memory"
            )
        (base / AGENT_GROUP).mkdir(exist_ok=True)
        (base / AGENT_GROUP / "cgroup.procs").write_text(str(os.getpid()))
    control.write_text("+memory")
    return base


def _parent_v1(tree: Hierarchies) -> Path:
    """This process's own group of version 1's memory controller.

    Raises:
        OSError: there is none.
    """
    own = tree.v1 / _membership(tree, "memory").lstrip("/")
    if not (own / "memory.limit_in_bytes").is_file():
        raise FileNotFoundError("not mounted")
    return own


def _membership(tree: Hierarchies, controller: str) -> str:
    """This process's path in the hierarchy of a controller; the unified one has no name.

    Raises:
        OSError: it is in no such hierarchy.
    """
    for line in tree.membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    raise OSError("no such hierarchy")


def _make_group(parent: Path, judge: Judge, cap_bytes: int | None, tree: Hierarchies) -> Path:
    owner = f"{os.getpid()}-{_start_time(os.getpid())}-"
    group = Path(tempfile.mkdtemp(prefix=PREFIX + owner, dir=parent))
    if cap_bytes is None:
        return group
    try:
        if judge == "cgroup_v2":
            (group / "memory.max").write_text(str(cap_bytes))
            _write_if_offered(group / "memory.swap.max", "0")
            _write_if_offered(group / "memory.oom.group", "1")
        else:
            (group / "memory.limit_in_bytes").write_text(str(cap_bytes))
            _write_if_offered(group / "memory.memsw.limit_in_bytes", str(cap_bytes))
    except OSError:
        _remove(group, tree)
        raise
    return group


def _write_if_offered(path: Path, value: str) -> None:
    """Write a file that a kernel without swap accounting, or an older one, does not have."""
    try:
        path.write_text(value)
    except OSError:
        return


def _remove_stale(parent: Path, tree: Hierarchies) -> None:
    """Remove the groups of owners that are no more; what still runs in them has nobody to answer to."""
    for group in parent.glob(f"{PREFIX}*"):
        process_id, _, rest = group.name.removeprefix(PREFIX).partition("-")
        if process_id.isdecimal() and _start_time(int(process_id)) != rest.partition("-")[0]:
            _remove(group, tree)


def _remove(group: Path, tree: Hierarchies) -> None:
    for _ in range(REMOVE_TRIES):
        try:
            tree.remove(group)
        except FileNotFoundError:
            return
        except OSError:
            _kill_members(group)
            time.sleep(REMOVE_PAUSE_S)
        else:
            return
    warn("group_left_behind", group=group)


def _kill_members(group: Path) -> None:
    try:
        members = [int(word) for word in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return
    for process_id in members:
        if process_id > 0:  # 0 stands for a process of another namespace, and to kill() for one's own group
            try:
                os.kill(process_id, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _start_time(process_id: int) -> str:
    """When a process started, in the kernel's ticks since boot; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19]


def _counter(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)


@functools.cache
def _warn_once(judge: Judge, note: str) -> None:
    warn("cap_enforcement", judge=judge, note=note)
