"""Memory control groups: find this process's own, make one below it for a worker, and remove it again.

A group carries its owner's process id and start time in its name, so that the groups of an owner that was killed are
recognised and removed. ``edge_runtime.memory.enforcement`` chooses among control groups and other means.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.log import warn

#: Prefix of the names of worker groups: PREFIX<owner's process id>-<owner's start time>-<anything>.
PREFIX = "edge-worker-"
#: Subgroup that the agent moves itself into under version 2, which allows no process beside subgroups.
AGENT_GROUP = "edge-agent"
#: Number of tries to remove a group, and the pause between them, since the kernel may hold its last process a while.
REMOVE_TRIES, REMOVE_PAUSE_S = 100, 0.02


@dataclass(frozen=True)
class Hierarchies:
    """Where the kernel shows control groups. Tests name a tree of plain folders instead.

    Attributes:
        v2: mount point of the unified hierarchy.
        v1: mount point of version 1's memory controller.
        membership: file that lists this process's groups.
        remove: function that removes one group; the kernel's own files in it do not count as content.
    """

    v2: Path = Path("/sys/fs/cgroup")
    v1: Path = Path("/sys/fs/cgroup/memory")
    membership: Path = Path("/proc/self/cgroup")
    remove: Callable[[Path], None] = Path.rmdir


def parent_v2(tree: Hierarchies) -> Path:
    """This process's own group, ready to have subgroups with a memory limit.

    Only a group that has the controller and holds no processes may have such subgroups. So the agent first moves itself
    into a subgroup, which it can do where it is alone: in a service whose unit delegates (``Delegate=memory``).

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


def parent_v1(tree: Hierarchies) -> Path:
    """This process's own group of version 1's memory controller.

    Raises:
        OSError: there is none.
    """
    own = tree.v1 / _membership(tree, "memory").lstrip("/")
    if not (own / "memory.limit_in_bytes").is_file():
        raise FileNotFoundError("not mounted")
    return own


def _membership(tree: Hierarchies, controller: str) -> str:
    """This process's path in the hierarchy of a controller; the unified hierarchy has an empty name.

    Raises:
        OSError: the process is in no such hierarchy.
    """
    for line in tree.membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    raise OSError("no such hierarchy")


def make_group(parent: Path, cap_bytes: int | None, tree: Hierarchies, *, unified: bool) -> Path:
    """Make a new group for one worker of this process.

    Args:
        parent: group below which it is made.
        cap_bytes: memory that the worker is held to; None sets no limit.
        tree: place of the control groups.
        unified: whether ``parent`` is of version 2.

    Raises:
        OSError: the group cannot be made or limited; nothing of it is left then.
    """
    owner = f"{os.getpid()}-{_start_time(os.getpid())}-"
    group = Path(tempfile.mkdtemp(prefix=PREFIX + owner, dir=parent))
    if cap_bytes is None:
        return group
    try:
        if unified:
            (group / "memory.max").write_text(str(cap_bytes))
            _write_if_offered(group / "memory.swap.max", "0")
            _write_if_offered(group / "memory.oom.group", "1")
        else:
            (group / "memory.limit_in_bytes").write_text(str(cap_bytes))
            _write_if_offered(group / "memory.memsw.limit_in_bytes", str(cap_bytes))
    except OSError:
        remove_group(group, tree)
        raise
    return group


def _write_if_offered(path: Path, value: str) -> None:
    """Write a file that kernels without swap accounting, and older ones, do not have."""
    try:
        path.write_text(value)
    except OSError:
        return


def remove_stale(parent: Path, tree: Hierarchies) -> None:
    """Remove the groups of owners that no longer run, with any process still in them."""
    for group in parent.glob(f"{PREFIX}*"):
        process_id, _, rest = group.name.removeprefix(PREFIX).partition("-")
        if process_id.isdecimal() and _start_time(int(process_id)) != rest.partition("-")[0]:
            remove_group(group, tree)


def remove_group(group: Path, tree: Hierarchies) -> None:
    """Remove a group, and kill any process still in it. A group that cannot be removed is logged."""
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
    """Start time of a process, in the kernel's ticks since boot; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19]
