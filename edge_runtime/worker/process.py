"""A worker's process: started under a memory limit, watched while it runs, and judged by how it ended."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import EdgeError, OutOfMemoryError, WorkerError
from edge_runtime.figures import size
from edge_runtime.memory.enforcement import MemoryLimit, make_memory_limit, remove_memory_limit
from edge_runtime.memory.meter import read_memory
from edge_runtime.memory.sampler import FIRST_PHASE, FOLLOW_INTERVAL_S, SAMPLE_INTERVAL_S, Sampler
from edge_runtime.package.prepared import is_current
from edge_runtime.worker.jobs import (
    FAILURE_EXIT_CODE,
    Failure,
    Job,
    OutcomeT,
    PhaseEntered,
    PrepareJob,
    PrepareOutcome,
    rebuild_error,
)

#: Number of bytes that a worker may write to standard output, and of phases that it may enter.
MAX_OUTPUT_BYTES = 1 << 20
#: How long a worker that is told to stop may take for its present step. Its parent has ten seconds in all.
STOP_GRACE_S = 8.0
MAX_PHASES = 1000
#: Length to which a library's own words about a refused allocation are cut.
MAX_HOW_CHARACTERS = 300
WORKER_COMMAND = (sys.executable, "-m", "edge_runtime.worker.main")
#: Signal that ends a program whose allocation was refused where no exception can be raised: abort(3).
REFUSED_MEMORY_SIGNAL = signal.SIGABRT


@dataclass(frozen=True)
class RunningWorker:
    """A worker that runs; :func:`finish_worker` waits for it and removes its memory limit.

    Attributes:
        process: its process.
        memory_limit: memory limit that it runs under.
        started_s: start, on the monotonic clock.
        on_look: function that is called at each look at the worker, a few times a second.
    """

    process: subprocess.Popen[bytes]
    memory_limit: MemoryLimit
    started_s: float
    on_look: Callable[[], None] = lambda: None

    def kill(self) -> None:
        """Stop the worker at once. Nothing happens if it has ended."""
        self.process.kill()

    def tell_to_stop(self) -> None:
        """Ask the worker to stop after its present step; may be called from any thread. It keeps a task's progress."""
        self.process.terminate()

    def close(self) -> None:
        """Stop the worker if it still runs, and remove its control group. More calls do nothing."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        remove_memory_limit(self.memory_limit)


def start_worker(
    job: Job, command: Sequence[str] = WORKER_COMMAND, on_look: Callable[[], None] = lambda: None
) -> RunningWorker:
    """Start a worker on a job, held to the job's ``cap_bytes``; pass it to :func:`finish_worker`.

    Args:
        job: the job.
        command: command that starts the worker's program.
        on_look: function that is called at each look at the worker, a few times a second.
    """
    worker = replace(launch_worker(job.cap_bytes, command), on_look=on_look)
    try:
        _hand_over(worker.process, msgspec.json.encode(job))
    except BaseException:
        worker.close()
        raise
    return worker


def launch_worker(cap_bytes: int, command: Sequence[str]) -> RunningWorker:
    """Start a worker's program under a memory limit, with pipes to its standard input and from its standard output.

    Args:
        cap_bytes: memory that the kernel holds it to.
        command: command that starts the program.
    """
    memory_limit = make_memory_limit(cap_bytes)
    try:
        process = subprocess.Popen(
            memory_limit.command(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except OSError:
        remove_memory_limit(memory_limit)
        raise
    worker = RunningWorker(process, memory_limit, time.monotonic())
    try:
        memory_limit.follow(process.pid)
    except BaseException:
        worker.close()
        raise
    return worker


def finish_worker(
    worker: RunningWorker,
    outcome: type[OutcomeT],
    timeout_s: float | None = None,
    sampler: Sampler | None = None,
) -> OutcomeT:
    """Wait for a worker, read its outcome and remove its memory limit.

    The outcome's memory report tells who enforced the cap and, under a control group, the kernel's largest charge.

    Args:
        worker: the worker, from :func:`start_worker`.
        outcome: class of the job's outcome.
        timeout_s: seconds after which the worker is stopped; None waits for ever.
        sampler: sampler that takes in phases and memory over time; None takes one of its own.

    Raises:
        OutOfMemoryError: the kernel killed the worker at its cap, or refused it memory.
        EdgeError: the worker raised it; class and message are the same.
        WorkerError: the worker was killed, timed out, or answered nonsense.
        KeyboardInterrupt: this process was told to stop; the worker had ``STOP_GRACE_S`` to keep its progress.
    """
    sampler = sampler or Sampler()
    try:
        output = _listen(worker, sampler, timeout_s)
        answer = _read(worker, sampler, output, outcome)
        memory = msgspec.structs.replace(answer.memory, enforced_by=worker.memory_limit.enforced_by)
        if worker.memory_limit.group:
            memory = msgspec.structs.replace(memory, cgroup_peak_bytes=worker.memory_limit.peak_bytes())
        return msgspec.structs.replace(answer, memory=memory)
    except KeyboardInterrupt:
        worker.tell_to_stop()
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(STOP_GRACE_S)
        raise
    finally:
        worker.close()


def run_worker(
    job: Job, outcome: type[OutcomeT], timeout_s: float | None = None, sampler: Sampler | None = None
) -> OutcomeT:
    """Start a worker and wait for its outcome.

    Args:
        job: the job.
        outcome: class of the job's outcome.
        timeout_s: seconds after which the worker is stopped; None waits for ever.
        sampler: sampler that takes in phases and memory over time; None takes one of its own.

    Raises:
        EdgeError: the worker failed; see :func:`finish_worker`.
    """
    return finish_worker(start_worker(job), outcome, timeout_s, sampler)


def ensure_prepared(job: PrepareJob, timeout_s: float | None = None) -> None:
    """Have a worker prepare a package, unless the folder already holds it, prepared for this machine.

    Raises:
        EdgeError: the worker failed (see :func:`finish_worker`); the folder is then as it was.
    """
    if not is_current(Path(job.prepared_folder), job.package_sha256, job.arithmetic, job.engine):
        run_worker(job, PrepareOutcome, timeout_s)


def _hand_over(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Give the worker its job. If it no longer listens, :func:`finish_worker` tells how it ended."""
    if process.stdin is None:
        raise WorkerError("the worker has no standard input")
    try:
        with process.stdin as stdin:
            stdin.write(data)
    except BrokenPipeError:
        pass
    process.stdin = None


def _listen(worker: RunningWorker, sampler: Sampler, timeout_s: float | None) -> bytes:
    """Wait for the end of a worker, looking at its memory meanwhile; the result is the last line that it wrote."""
    stdout = worker.process.stdout
    if stdout is None:
        raise WorkerError("the worker has no standard output")
    deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    interval_s = look_interval_s(worker)
    answer, unread, written, phases = b"", b"", 0, 0
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        look_s = 0.0
        while True:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                raise WorkerError(f"the worker ran past its limit of {timeout_s:.0f} s and was stopped")
            if now_s >= look_s:
                look(worker, sampler)
                look_s = now_s + interval_s
            ended = worker.process.poll() is not None
            if not selector.select(0.0 if ended else max(0.0, min(look_s, deadline_s) - now_s)):
                if ended:  # a process it left behind holds its output open
                    break
                continue
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                break
            written += len(data)
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                answer = line or answer
                phase = _phase(line)
                if phase is not None:
                    phases += 1
                    sampler.phase = phase
                    look(worker, sampler)
            if written > MAX_OUTPUT_BYTES or phases > MAX_PHASES:
                raise WorkerError(
                    f"the worker wrote over {MAX_OUTPUT_BYTES} bytes or {MAX_PHASES} phases and was stopped"
                )
    try:
        worker.process.wait(None if timeout_s is None else max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise WorkerError(f"the worker ran past its limit of {timeout_s:.0f} s and was stopped") from None
    return unread or answer


def look_interval_s(worker: RunningWorker) -> float:
    """Seconds between two looks at a worker that works."""
    return FOLLOW_INTERVAL_S if worker.memory_limit.enforced_by == "rlimit" else SAMPLE_INTERVAL_S


def look(worker: RunningWorker, sampler: Sampler) -> None:
    """Note a worker's memory, and let a limit that follows it follow."""
    worker.on_look()
    memory = read_memory(worker.process.pid)
    if memory is not None:
        sampler.add(time.monotonic() - worker.started_s, memory)
        if sampler.phase != FIRST_PHASE:  # while libraries load, they map much that they never touch
            worker.memory_limit.follow(worker.process.pid, memory)


def _phase(line: bytes) -> str | None:
    """The phase that a line announces; None if the line is part of the answer."""
    try:
        return msgspec.json.decode(line, type=PhaseEntered).phase
    except MALFORMED:
        return None


def _read(worker: RunningWorker, sampler: Sampler, output: bytes, outcome: type[OutcomeT]) -> OutcomeT:
    """The outcome of a worker that has ended.

    Raises:
        EdgeError: the worker failed; see :func:`finish_worker`.
    """
    if worker.process.returncode != 0:
        raise why_ended(worker, sampler, output)
    try:
        return msgspec.json.decode(output, type=outcome)
    except MALFORMED as error:
        raise WorkerError(f"the worker's answer cannot be read: {error}") from error


def why_ended(worker: RunningWorker, sampler: Sampler, output: bytes) -> EdgeError:
    """The error by which a worker ended.

    Args:
        worker: a worker whose process has ended.
        sampler: sampler that knows its last phase and memory.
        output: the last line that it wrote.
    """
    code = worker.process.returncode
    if code < 0:
        return _why_killed(worker, sampler, -code)
    if code == FAILURE_EXIT_CODE:
        try:
            failure = msgspec.json.decode(output, type=Failure)
        except MALFORMED as error:
            return WorkerError(f"the worker's answer cannot be read: {error}")
        if failure.kind == OutOfMemoryError.__name__:
            return _out_of_memory(worker, sampler, failure.message)
        return rebuild_error(failure)
    return WorkerError(f"the worker stopped with exit code {code}; its log tells why")


def _why_killed(worker: RunningWorker, sampler: Sampler, number: int) -> EdgeError:
    """The error by which a signal ended a worker."""
    killed = number == signal.SIGKILL and worker.memory_limit.killed_for_memory()
    refused = number == REFUSED_MEMORY_SIGNAL and worker.memory_limit.enforced_by == "rlimit"
    name = signal.Signals(number).name
    if killed or refused:
        return _out_of_memory(worker, sampler, f"ended by {name}")
    if number == signal.SIGBUS:
        return WorkerError(
            "the worker was killed by SIGBUS: a weight file was truncated, or could not be read, while it was "
            "mapped; check the disk, and let nothing change package folders while a worker runs"
        )
    why = "not by its cap" if worker.memory_limit.group else "perhaps the whole machine ran out of memory"
    return WorkerError(f"the worker was killed by {name}, {why}; the kernel's log or the worker's tells more")


def _out_of_memory(worker: RunningWorker, sampler: Sampler, how: str) -> OutOfMemoryError:
    cap_bytes, enforced_by, last = (
        worker.memory_limit.cap_bytes or 0,
        worker.memory_limit.enforced_by,
        sampler.last,
    )
    seen = (
        f"{size(last.resident_bytes)} resident, {size(last.anonymous_bytes)} its own,"
        if last
        else "nothing known"
    )
    return OutOfMemoryError(
        f"the worker ran out of memory in phase {sampler.phase} ({how[:MAX_HOW_CHARACTERS]}): {seen} when last looked "
        f"at, the cap is {size(cap_bytes)} ({enforced_by}); grant a larger cap, or ask for shorter sequences, "
        "fewer draws or fewer slices",
        phase=sampler.phase,
        last_bytes=last.resident_bytes if last else 0,
        cap_bytes=cap_bytes,
        enforced_by=enforced_by,
    )
