"""The cap as the kernel enforces it: on real control groups and limits, and version 2's rules on a tree of folders."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_runtime.errors import EdgeError, OutOfMemoryError, WorkerError
from edge_runtime.memory import cgroups, enforcement
from edge_runtime.memory.cgroups import AGENT_GROUP, PREFIX, Hierarchies
from edge_runtime.memory.enforcement import (
    LATER_SLACK_BYTES,
    MemoryLimit,
    make_memory_limit,
    memory_limit,
    ran_out_of_memory,
    remove_memory_limit,
)
from edge_runtime.memory.sampler import Sampler
from edge_runtime.worker import process
from edge_runtime.worker.jobs import EvaluateOutcome
from edge_runtime.worker.process import RunningWorker, finish_worker, start_worker
from tests.edge_runtime.jobs import EVALUATE_JOB

MIB = 1 << 20
CAP_BYTES = 96 * MIB
JOB = replace(EVALUATE_JOB, cap_bytes=CAP_BYTES)
NOWHERE = Hierarchies(v2=Path("/nonexistent"), v1=Path("/nonexistent"))

#: The real worker's main around a job that does something else in phase "step".
WORKER = """
import os, sys, time
from edge_runtime.worker import main as worker
def run(job, announce):
    announce("step")
    time.sleep(0.3)
    {body}
worker.run = run
sys.exit(worker.main())
"""
#: Takes one MiB after the other, slowly enough to be watched, and never stops by itself.
GROWING = "kept = []\n    while True: kept.append(bytearray(b'x') * (1 << 20)); time.sleep(0.005)"
ONE_BLOCK = "bytearray(b'x') * (1 << 30)"
#: An interpreter without the engine, doing the same.
SMALL_GROWING = f"import time\nif True:\n    {GROWING}"


@pytest.fixture(scope="module")
def v1_parent() -> Path:
    """This process's own group of version 1's memory controller."""
    with memory_limit(CAP_BYTES) as limit:
        if limit.enforced_by != "cgroup_v1" or limit.group is None:
            pytest.skip(
                f"no writable memory controller of cgroup version 1 here; {limit.enforced_by} {limit.note}"
            )
        return limit.group.parent


@pytest.fixture
def without_groups(monkeypatch) -> None:
    """A machine on which no control group can be made."""
    monkeypatch.setattr(process, "make_memory_limit", lambda cap_bytes: make_memory_limit(cap_bytes, NOWHERE))


def worker_that(program: str) -> RunningWorker:
    return start_worker(JOB, [sys.executable, "-c", program])


def groups_of_this_process(parent: Path) -> list[Path]:
    return list(parent.glob(f"{PREFIX}{os.getpid()}-*"))


# The real kernel, version 1.


@pytest.mark.parametrize("body", [GROWING, ONE_BLOCK])
def test_the_kernel_kills_at_the_cap_and_the_phase_is_known(v1_parent, body: str) -> None:
    """A worker over its cap is killed: the error has phase, last sample, cap and enforcer, in one line."""
    sampler = Sampler()
    with pytest.raises(OutOfMemoryError) as caught:
        finish_worker(worker_that(WORKER.format(body=body)), EvaluateOutcome, 60, sampler)
    error = caught.value
    assert (error.phase, error.cap_bytes, error.enforced_by) == ("step", CAP_BYTES, "cgroup_v1")
    assert sampler.last is not None
    assert error.last_bytes == sampler.last.resident_bytes > 16 * MIB
    assert "ended by SIGKILL" in str(error)
    assert str(error).isprintable()
    assert groups_of_this_process(v1_parent) == []


def test_a_slowly_growing_worker_gets_all_of_its_cap(v1_parent) -> None:
    """The last sample before the kill shows own pages near the cap: the limit is neither early nor late."""
    sampler = Sampler()
    with pytest.raises(OutOfMemoryError):
        finish_worker(
            worker_that(f"import sys; sys.stdin.read()\n{SMALL_GROWING}"), EvaluateOutcome, 60, sampler
        )
    largest = max(sample.anonymous_bytes for sample in sampler.samples)
    assert 0.6 * CAP_BYTES < largest <= CAP_BYTES


def test_a_plain_kill_is_told_apart(v1_parent) -> None:
    """SIGKILL from somebody else is a WorkerError that says it was not the cap."""
    worker = worker_that("import time; time.sleep(60)")
    worker.kill()
    with pytest.raises(WorkerError, match="SIGKILL, not by its cap"):
        finish_worker(worker, EvaluateOutcome)


def test_the_interpreter_itself_is_charged(v1_parent) -> None:
    """The child is in its group before it becomes Python: an empty program is charged some MiB."""
    with memory_limit(CAP_BYTES) as limit:
        subprocess.run(limit.command([sys.executable, "-c", ""]), check=True)
        peak = limit.peak_bytes()
        assert not limit.killed_for_memory()
    assert peak is not None
    assert 2 * MIB < peak < CAP_BYTES


def test_the_report_names_judge_and_the_kernels_peak(v1_parent) -> None:
    """A worker's own report is completed by its parent, who sees the group's peak after the end."""
    outcome = finish_worker(
        worker_that("kept = b'x' * (32 << 20)\nimport sys; sys.stdin.read()\n" + OUTCOME), EvaluateOutcome
    )
    assert outcome.memory.enforced_by == "cgroup_v1"
    assert outcome.memory.cgroup_peak_bytes is not None
    assert 32 * MIB < outcome.memory.cgroup_peak_bytes < CAP_BYTES


OUTCOME = """
import json
print(json.dumps({
    "rows": 4, "accuracy": 0.5, "mean_loss": 1.0, "seconds": 0.1,
    "memory": {"predicted_peak_bytes": 5, "high_water_bytes": 4, "cap_bytes": 9},
}))
"""


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("import sys; sys.exit(1)", WorkerError),
        ("import time; time.sleep(60)", WorkerError),
        ("import os; os.kill(os.getpid(), 9)", WorkerError),
        (SMALL_GROWING, OutOfMemoryError),
        (
            "import subprocess; subprocess.Popen(['sleep', '60']); import os; os.kill(os.getpid(), 9)",
            WorkerError,
        ),
    ],
    ids=["failure", "timeout", "kill", "out of memory", "child left behind"],
)
def test_no_group_is_left_behind(v1_parent, program: str, kind: type[EdgeError]) -> None:
    """However a worker ends its group is removed, and with it whatever the worker had started."""
    with pytest.raises(kind):
        finish_worker(worker_that(program), EvaluateOutcome, timeout_s=3)
    assert groups_of_this_process(v1_parent) == []


def test_a_process_left_behind_does_not_hold_up_its_parent() -> None:
    """A dead worker is dead, though a child of its own still holds its standard output."""
    started_s = time.monotonic()
    with pytest.raises(WorkerError, match="exit code 5"):
        finish_worker(
            worker_that("import subprocess, sys; subprocess.Popen(['sleep', '5']); sys.exit(5)"),
            EvaluateOutcome,
        )
    assert time.monotonic() - started_s < 4


def test_no_group_is_left_behind_by_a_worker_that_cannot_start(v1_parent, monkeypatch) -> None:
    """If no process can be made the group goes too."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(OSError, match="no more processes"):
        start_worker(JOB)
    assert groups_of_this_process(v1_parent) == []


def test_what_a_killed_agent_left_behind_is_removed_at_the_next_start(v1_parent) -> None:
    """Group and orphaned worker of an owner that is no more both go when the next limit is made."""
    dying = (
        "import os, subprocess\n"
        "from edge_runtime.memory.enforcement import make_memory_limit\n"
        f"limit = make_memory_limit({CAP_BYTES})\n"
        "child = subprocess.Popen(limit.command(['sleep', '600']), stdout=-3, stderr=-3)\n"
        "while str(child.pid) not in (limit.group / 'cgroup.procs').read_text().split(): pass\n"
        "print(limit.group, child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", dying], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    group, orphan = done.stdout.split()
    assert Path(group).is_dir()
    with memory_limit(CAP_BYTES):
        assert not Path(group).exists()
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{orphan}").exists() and _state(orphan) != "Z":
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _state(process_id: str) -> str:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_cap_the_kernel_does_not_take_falls_back(v1_parent) -> None:
    """A group that cannot be limited is removed, and the note has the kernel's reason."""
    limit = make_memory_limit(-5)
    assert limit.enforced_by == "rlimit"
    assert "cgroup_v1: Invalid argument" in limit.note
    assert groups_of_this_process(v1_parent) == []


# The real kernel, RLIMIT_DATA: everywhere.


@pytest.mark.parametrize("body", [GROWING, ONE_BLOCK, "import numpy; numpy.ones(1 << 27)"])
def test_without_groups_a_refused_allocation_is_the_same_error(without_groups, body: str) -> None:
    """What Python or numpy raise when RLIMIT_DATA refuses them arrives as OutOfMemoryError with its phase."""
    with pytest.raises(OutOfMemoryError, match="MemoryError") as caught:
        finish_worker(worker_that(WORKER.format(body=body)), EvaluateOutcome, 60)
    assert (caught.value.phase, caught.value.cap_bytes, caught.value.enforced_by) == (
        "step",
        CAP_BYTES,
        "rlimit",
    )
    assert caught.value.last_bytes > 16 * MIB


def test_without_groups_resident_memory_is_held_near_the_cap(without_groups) -> None:
    """The limit follows the worker: it gets its cap although it maps more, and at most the slack beyond."""
    sampler = Sampler()
    with pytest.raises(OutOfMemoryError):
        finish_worker(worker_that(WORKER.format(body=GROWING)), EvaluateOutcome, 60, sampler)
    largest = max(sample.resident_bytes for sample in sampler.samples)
    assert CAP_BYTES - 8 * MIB < largest < CAP_BYTES + LATER_SLACK_BYTES + 8 * MIB


def test_without_groups_an_abort_counts_as_refused_memory(without_groups) -> None:
    """Libraries that cannot raise end in SIGABRT when memory is refused; another signal says nothing."""
    with pytest.raises(OutOfMemoryError, match="ended by SIGABRT"):
        finish_worker(worker_that("import os; os.abort()"), EvaluateOutcome)
    with pytest.raises(WorkerError, match="SIGKILL, perhaps the whole machine"):
        finish_worker(worker_that("import os; os.kill(os.getpid(), 9)"), EvaluateOutcome)


def test_without_groups_the_report_says_so(without_groups) -> None:
    """The enforcer is named, and there is no kernel's peak to add."""
    outcome = finish_worker(worker_that("import sys; sys.stdin.read()\n" + OUTCOME), EvaluateOutcome)
    assert outcome.memory.enforced_by == "rlimit"
    assert outcome.memory.cgroup_peak_bytes is None


def test_a_hard_limit_of_the_operator_is_kept(without_groups) -> None:
    """A lower hard limit that was set from outside stays; the soft one never goes over it."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (1 << 28, 1 << 28)); print(flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    make_memory_limit(1 << 33, NOWHERE).follow(process.pid)
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    process.communicate()
    assert f"Max data size             {1 << 28}" in limits
    make_memory_limit(1 << 33, NOWHERE).follow(process.pid)


def test_the_reason_is_logged_once(caplog, monkeypatch) -> None:
    """Falling back is a warning with its reason, once and not for every worker."""
    enforcement._warn_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("edge_runtime"), "propagate", True)
    for _ in range(3):
        assert "cgroup_v2: not mounted; cgroup_v1: not mounted" in make_memory_limit(CAP_BYTES, NOWHERE).note
    assert [record.getMessage().split()[1] for record in caplog.records] == ["enforced_by=rlimit"]


def test_measuring_alone_needs_no_judge() -> None:
    """Without a cap and without groups nothing is enforced, and commands are left as they are."""
    with memory_limit(None, NOWHERE) as limit:
        assert (limit.enforced_by, limit.group, limit.peak_bytes()) == (
            "none",
            None,
            None,
        )
        assert limit.command(["a", "b"]) == ["a", "b"]
        assert not limit.killed_for_memory()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("pthread_create failed: Cannot allocate memory"), True),
        (RuntimeError("Exception during initialization: std::bad_alloc"), True),
        (ValueError("bad value"), False),
    ],
)
def test_a_refused_allocation_is_known_by_class_or_words(error: Exception, expected: bool) -> None:
    """The cause counts too, since the engine wraps its library's errors."""
    assert ran_out_of_memory(error) is expected
    wrapped = WorkerError("onnxruntime failed")
    wrapped.__cause__ = error
    assert ran_out_of_memory(wrapped) is expected


# Version 2's rules, on a tree of folders that stands in for the kernel's.


class FakeTree:
    """A unified hierarchy in which this process is in ``own``."""

    def __init__(self, folder: Path, own: str = "/system.slice/edge.service") -> None:
        self.base = folder / "cgroup" / own.lstrip("/")
        self.tree = Hierarchies(folder / "cgroup", folder / "none", folder / "membership", shutil.rmtree)
        self.tree.membership.write_text(f"0::{own}\n")
        self.base.mkdir(parents=True)
        self.write("cgroup.controllers", "cpu memory pids\n")
        self.write("cgroup.subtree_control", "")
        self.write("cgroup.type", "domain\n")
        self.write("cgroup.procs", f"{os.getpid()}\n")

    def write(self, name: str, text: str) -> None:
        """Give one of the kernel's files this content."""
        (self.base / name).write_text(text)

    def groups(self) -> list[Path]:
        """The workers' groups."""
        return sorted(self.base.glob(f"{PREFIX}*"))


def group_of(limit: MemoryLimit) -> Path:
    assert limit.enforced_by == "cgroup_v2", limit.note
    assert limit.group is not None
    return limit.group


def test_a_delegated_group_is_divided(tmp_path) -> None:
    """The agent steps into a subgroup, hands the controller down, and the worker gets its limit without swap."""
    fake = FakeTree(tmp_path)
    with memory_limit(CAP_BYTES, fake.tree) as limit:
        group = group_of(limit)
        assert group.parent == fake.base
        assert (fake.base / AGENT_GROUP / "cgroup.procs").read_text() == str(os.getpid())
        assert (fake.base / "cgroup.subtree_control").read_text() == "+memory"
        assert (group / "memory.max").read_text() == str(CAP_BYTES)
        assert (group / "memory.swap.max").read_text() == "0"
        assert (group / "memory.oom.group").read_text() == "1"
        assert limit.note == ""
        assert limit.command(["python"])[-2:] == [str(group / "cgroup.procs"), "python"]
    assert fake.groups() == []


def test_an_agent_that_has_stepped_aside_makes_groups_beside_itself(tmp_path) -> None:
    """The second worker's group is a sibling of the agent's own, not a child of it."""
    fake = FakeTree(tmp_path)
    fake.write("cgroup.subtree_control", "memory\n")
    fake.tree.membership.write_text(f"0::/system.slice/edge.service/{AGENT_GROUP}\n")
    with memory_limit(CAP_BYTES, fake.tree) as limit:
        assert group_of(limit).parent == fake.base


def test_the_machines_root_needs_no_stepping_aside(tmp_path) -> None:
    """The root group, told by having no type, may hold processes beside subgroups."""
    fake = FakeTree(tmp_path, "/")
    (fake.base / "cgroup.type").unlink()
    fake.write("cgroup.procs", "1\n2\n")
    with memory_limit(CAP_BYTES, fake.tree) as limit:
        assert group_of(limit).parent == fake.base
    assert not (fake.base / AGENT_GROUP).exists()


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("cgroup.controllers", "cpu pids\n", "memory controller is not delegated"),
        ("cgroup.procs", "1\n", "Delegate=memory"),
    ],
)
def test_a_group_that_is_not_ours_to_divide_falls_back(tmp_path, file: str, text: str, reason: str) -> None:
    """Without delegation, or beside other processes, nothing is moved and the note says why."""
    fake = FakeTree(tmp_path)
    fake.write(file, text)
    limit = make_memory_limit(CAP_BYTES, fake.tree)
    assert limit.enforced_by == "rlimit"
    assert reason in limit.note
    assert sorted(path.name for path in fake.base.iterdir() if path.is_dir()) == []


def test_a_process_in_no_hierarchy_falls_back(tmp_path) -> None:
    """A membership file without the wanted lines is a reason, not a crash."""
    fake = FakeTree(tmp_path)
    fake.tree.membership.write_text("5:cpu,cpuacct:/\n")
    assert "no such hierarchy" in make_memory_limit(CAP_BYTES, fake.tree).note


def test_kills_and_peak_are_read_from_the_group(tmp_path) -> None:
    """The kernel's counter of kills tells an out-of-memory kill, and its peak is the charge."""
    limit = make_memory_limit(CAP_BYTES, FakeTree(tmp_path).tree)
    group = group_of(limit)
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 0\noom_group_kill 0\n")
    assert not limit.killed_for_memory()
    assert limit.peak_bytes() is None
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 1\n")
    (group / "memory.peak").write_text("12345\n")
    assert limit.killed_for_memory()
    assert limit.peak_bytes() == 12345


@pytest.mark.parametrize(("failures", "killed"), [("0\n", False), ("7\n", True)])
def test_a_kernel_without_a_counter_of_kills_tells_by_its_failures(
    tmp_path, failures: str, killed: bool
) -> None:
    """Version 1 before Linux 4.13 only says how often the limit was hit."""
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n")
    (tmp_path / "memory.failcnt").write_text(failures)
    assert MemoryLimit("cgroup_v1", CAP_BYTES, tmp_path).killed_for_memory() is killed


def test_only_groups_of_dead_owners_are_stale(tmp_path) -> None:
    """Another living agent's group stays, and one whose owner's number was given to a new process goes."""
    fake = FakeTree(tmp_path)
    init_started = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
    living = fake.base / f"{PREFIX}1-{init_started}-a"
    reused = fake.base / f"{PREFIX}1-{int(init_started) + 1}-b"
    dead = fake.base / f"{PREFIX}{1 << 30}-5-c"
    foreign = fake.base / f"{PREFIX}of-somebody-else"
    for folder in (living, reused, dead, foreign):
        folder.mkdir()
    limit = make_memory_limit(CAP_BYTES, fake.tree)
    assert fake.groups() == sorted([living, foreign, group_of(limit)])


def test_a_group_that_cannot_be_removed_is_logged(tmp_path, caplog, monkeypatch) -> None:
    """Members of other namespaces, shown as 0, are nobody to kill; giving up is a warning."""
    monkeypatch.setattr(logging.getLogger("edge_runtime"), "propagate", True)
    monkeypatch.setattr(cgroups, "REMOVE_TRIES", 2)
    (tmp_path / "cgroup.procs").write_text(f"0\n{1 << 22}\n")
    remove_memory_limit(MemoryLimit("cgroup_v2", 1, tmp_path), Hierarchies())
    assert f"group_left_behind group={tmp_path}" in caplog.text
