from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.memory.meter import Meter, proportional_bytes, read_memory, status_bytes

MIB = 1 << 20
ON_LINUX = Path("/proc/self/status").exists()
pytestmark = pytest.mark.skipif(not ON_LINUX, reason="memory is measured through /proc")

#: A fresh interpreter, so that earlier tests' memory is not in the way.
PHASES = """
from edge_runtime.memory.meter import Meter, status_bytes
meter = Meter()
meter.enter("large")
block = bytearray(b"x") * (64 << 20)
del block
meter.enter("small")
meter.close()
print(meter.resets, meter.phases["start"], meter.phases["large"], meter.phases["small"], meter.peak_bytes)
"""


def test_each_phase_has_its_own_mark() -> None:
    """What one phase took and gave back is in its mark and in the peak, not in the next phase's mark."""
    done = subprocess.run([sys.executable, "-c", PHASES], capture_output=True, text=True, check=True)
    resets, *marks = done.stdout.split()
    start, large, small, peak = map(int, marks)
    assert large >= start + 60 * MIB
    assert peak == large
    if resets == "True":
        assert small < large - 50 * MIB
    else:
        assert small == large


def test_a_phase_entered_twice_keeps_its_larger_mark() -> None:
    """A phase that comes back keeps the largest of its marks, and the peak is the largest of all."""
    meter = Meter()
    meter.enter("a")
    block = bytearray(b"x") * (32 * MIB)
    meter.enter("b")
    del block
    first = meter.phases["a"]
    meter.enter("a")
    meter.close()
    assert meter.phases["a"] == first
    assert meter.peak_bytes >= max(meter.phases.values())


def test_status_reads_sizes_in_bytes() -> None:
    """Fields of /proc/self/status come in bytes; one that does not exist is zero."""
    resident = status_bytes("VmRSS")
    assert 8 * MIB < resident <= status_bytes("VmHWM") + MIB
    assert status_bytes("VmNothing") == 0


def test_each_phase_is_announced() -> None:
    """Whoever asked hears of each phase as it is entered, in order."""
    heard: list[str] = []
    meter = Meter(heard.append)
    meter.enter("a")
    assert heard == ["a"]
    meter.enter("b")
    meter.close()
    assert heard == ["a", "b"]


def test_a_process_is_read_from_outside() -> None:
    """The sizes of a process fit each other: resident is own plus file pages, and own pages are mapped."""
    memory = read_memory(os.getpid())
    assert memory is not None
    assert memory.resident_bytes == memory.anonymous_bytes + memory.file_bytes
    assert 4 * MIB < memory.anonymous_bytes < memory.data_bytes


def test_a_process_that_ended_has_no_memory() -> None:
    """Neither a zombie nor a process that is gone has sizes."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert read_memory(process.pid) is None
    process.communicate()
    assert read_memory(process.pid) is None


def test_shared_pages_count_by_their_share() -> None:
    """The proportional set size is no larger than what is resident, and this process holds some of each kind."""
    anonymous_bytes, file_bytes = proportional_bytes()
    resident = read_memory(os.getpid())
    assert resident is not None
    assert 0 < anonymous_bytes <= resident.anonymous_bytes * 1.1
    assert 0 < file_bytes <= resident.file_bytes * 1.1
