"""Run a program in a fresh process, in a memory cgroup of its own, and measure its peak.

The cgroup's peak is the kernel's charge for the process and all its children: private memory, and pages of files
that nobody had read before. The kernel kills what exceeds an enforced limit, so a program that ended stayed within it.
The group is a child of this process's own, made as for the agent's worker (``edge_runtime.memory.enforcement``). Where
none can be made, the peak is the kernel's ``ru_maxrss`` instead and :attr:`Measured.note` says why.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.memory.enforcement import memory_limit

#: Seconds between two looks at a running program, long enough not to disturb what it measures.
POLL_SECONDS = 0.05


class ProgramFailedError(Exception):
    """The program was killed, ran too long, or ended with an error; the message holds what it wrote."""


@dataclass(frozen=True)
class Measured:
    """One finished program.

    Attributes:
        output: what it wrote to standard output.
        cgroup_peak_bytes: the kernel's largest charge for it; None without a cgroup.
        children_peak_bytes: sum of VmHWM over its children, sampled; 0 if it had none.
        max_resident_bytes: ``ru_maxrss``, an upper bound of its largest resident set. It is never below what this
            process itself holds, since the mark survives exec: start programs from a small process.
        note: why there was no cgroup, or empty.
    """

    output: bytes
    cgroup_peak_bytes: int | None
    children_peak_bytes: int
    max_resident_bytes: int
    note: str


def run_measured(
    command: Sequence[str], given: bytes = b"", *, limit_bytes: int | None = None, timeout_s: float = 600.0
) -> Measured:
    """Run a program to its end.

    Args:
        command: program and its arguments.
        given: bytes for its standard input.
        limit_bytes: memory that the kernel lets it have; without a cgroup it is not enforced, and a note says so.
        timeout_s: seconds after which it is killed.

    Raises:
        ProgramFailedError: it did not end with exit code 0.
    """
    with (
        memory_limit(limit_bytes) as limit,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as out,
    ):
        stdin.write(given)
        stdin.seek(0)
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen(limit.command(command), stdin=stdin, stdout=out, stderr=err)
            resident, children = _watch(process, timeout_s)
            out.seek(0)
            err.seek(0)
            if process.returncode:
                raise ProgramFailedError(
                    _failure(command, process.returncode, limit_bytes, out.read() + err.read())
                )
        return Measured(
            output=out.read(),
            cgroup_peak_bytes=limit.peak_bytes(),
            children_peak_bytes=children,
            max_resident_bytes=resident,
            note=f"{limit.note}: ru_maxrss instead, and no limit enforced" if limit.note else "",
        )


def _watch(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[int, int]:
    """Wait for the program; returns its ``ru_maxrss`` and the summed VmHWM of its children, in bytes."""
    deadline = time.monotonic() + timeout_s
    children: dict[int, int] = {}
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss * 1024, sum(children.values())
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGKILL)
        for child in _descendants(process.pid):
            children[child] = max(children.get(child, 0), _high_water(child))
        time.sleep(POLL_SECONDS)


def _descendants(process_id: int) -> Iterator[int]:
    for listing in Path(f"/proc/{process_id}/task").glob("*/children"):
        try:
            direct = [int(word) for word in listing.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in direct:
            yield child
            yield from _descendants(child)


def _high_water(process_id: int) -> int:
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:  # the process has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _failure(command: Sequence[str], code: int, limit_bytes: int | None, written: bytes) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    limit = f" under a limit of {limit_bytes} bytes" if limit_bytes else ""
    name = " ".join(word for word in command if word != sys.executable)
    return f"{name} ended with {how}{limit}\n{written[-4000:].decode(errors='replace')}"


def pinned_to_cores(count: int) -> tuple[int, ...]:
    """Keep this process and its children on the first ``count`` cores it may use; returns them."""
    cores = tuple(sorted(os.sched_getaffinity(0))[:count])
    os.sched_setaffinity(0, cores)
    return cores


def python_program(module: str, *arguments: object) -> list[str]:
    """The command that runs one of this project's modules."""
    return [shutil.which(sys.executable) or sys.executable, "-m", module, *map(str, arguments)]
