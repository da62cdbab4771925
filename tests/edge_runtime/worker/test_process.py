"""How a worker process's end is read, with processes that end in every way."""

from __future__ import annotations

import sys

import msgspec
import pytest

from edge_runtime import errors
from edge_runtime.errors import CapExceededError, DataError, EdgeError, RefusedError, WorkerError
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.memory.sampler import Sampler
from edge_runtime.worker.jobs import (
    EvaluateOutcome,
    Failure,
    Job,
    PrepareJob,
    TrainJob,
    describe_failure,
)
from edge_runtime.worker.process import (
    FAILURE_EXIT_CODE,
    MAX_OUTPUT_BYTES,
    MAX_PHASES,
    RunningWorker,
    finish_worker,
    start_worker,
)
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.jobs import EVALUATE_JOB

OUTCOME = """
import json
print(json.dumps({
    "rows": 4, "accuracy": 0.5, "mean_loss": 1.0, "seconds": 0.1,
    "memory": {"predicted_peak_bytes": 5, "high_water_bytes": 4, "cap_bytes": 9},
}), end="")
"""


def worker_that(program: str) -> RunningWorker:
    return start_worker(EVALUATE_JOB, [sys.executable, "-c", f"import sys; sys.stdin.read()\n{program}"])


def failing_with(failure: Failure) -> RunningWorker:
    data = msgspec.json.encode(failure)
    return worker_that(f"import sys; sys.stdout.buffer.write({data!r}); sys.exit({FAILURE_EXIT_CODE})")


def test_jobs_survive_the_way_to_the_worker() -> None:
    """Every kind of job decodes to what was encoded."""
    jobs = [
        TrainJob(
            "p",
            "0" * 64,
            "q",
            "s",
            "d",
            "c",
            TASK,
            cap_bytes=2,
            budget_bytes=1,
            choice=ExecutionChoice("streamed", 2, 1),
        ),
        EVALUATE_JOB,
        PrepareJob("p", "0" * 64, "q", cap_bytes=1, arithmetic="float"),
    ]
    for job in jobs:
        assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job


@pytest.mark.parametrize("kind", ["DataError", "PackageError", "SliceError", "SignatureError", "WorkerError"])
def test_an_error_comes_back_as_its_own_class(kind: str) -> None:
    """The class the worker raised is raised here, with its message."""
    with pytest.raises(EdgeError) as caught:
        finish_worker(failing_with(Failure(kind, "line 3")), EvaluateOutcome)
    assert type(caught.value) is getattr(errors, kind)
    assert str(caught.value) == "line 3"


def test_looks_at_a_worker_are_told() -> None:
    """Who waits for a worker is called at each look at it, so that it can say that it lives itself."""
    looks: list[int] = []
    command = [sys.executable, "-c", f"import sys, time; sys.stdin.read(); time.sleep(0.3)\n{OUTCOME}"]
    finish_worker(start_worker(EVALUATE_JOB, command, lambda: looks.append(1)), EvaluateOutcome)
    assert len(looks) >= 2


def test_a_refused_cap_comes_back_with_both_figures() -> None:
    """A CapExceededError keeps what was needed and what was granted."""
    failure = describe_failure(CapExceededError("too small", required_bytes=300, cap_bytes=200))
    with pytest.raises(CapExceededError, match="too small") as caught:
        finish_worker(failing_with(failure), EvaluateOutcome)
    assert (caught.value.required_bytes, caught.value.cap_bytes) == (300, 200)


@pytest.mark.parametrize("kind", ["Nothing", "RefusedError", "__name__", "annotations", "Exception"])
def test_a_class_that_is_not_ours_comes_back_as_a_worker_error(kind: str) -> None:
    """Only error classes that need nothing but a message are rebuilt by name."""
    with pytest.raises(WorkerError, match="why") as caught:
        finish_worker(failing_with(Failure(kind, "why")), EvaluateOutcome)
    assert type(caught.value) is WorkerError


def test_describing_an_error_keeps_class_and_message() -> None:
    """Messages are cut to the wire's limit, figures are zero where an error has none."""
    assert describe_failure(DataError("x" * 5000)) == Failure("DataError", "x" * 2000)
    assert describe_failure(RefusedError("no", code="stale")).kind == "RefusedError"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('nonsense')", "cannot be read"),
        ("print('{}')", "cannot be read"),
        (f"import sys; print('nonsense'); sys.exit({FAILURE_EXIT_CODE})", "cannot be read"),
        ("import sys; sys.exit(1)", "exit code 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, "),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "killed by SIGTERM, "),
    ],
)
def test_every_other_end_is_a_worker_error(program: str, message: str) -> None:
    """Nonsense, an unknown exit code and a signal are WorkerErrors that say which."""
    with pytest.raises(WorkerError, match=message):
        finish_worker(worker_that(program), EvaluateOutcome)


def test_a_worker_past_its_time_is_stopped() -> None:
    """A worker that runs past its limit is killed, and the error gives the limit."""
    worker = worker_that("import time; time.sleep(60)")
    with pytest.raises(WorkerError, match="limit of 1 s"):
        finish_worker(worker, EvaluateOutcome, timeout_s=1)
    assert worker.process.poll() is not None


def test_a_worker_that_closes_its_output_is_stopped_too() -> None:
    """The limit counts until the worker has ended, not until it falls silent."""
    worker = worker_that("import os, time; os.close(1); time.sleep(60)")
    with pytest.raises(WorkerError, match="limit of 1 s"):
        finish_worker(worker, EvaluateOutcome, timeout_s=1)
    assert worker.process.poll() is not None


def test_a_worker_that_never_reads_its_job_ends_in_its_own_way() -> None:
    """A worker that dies before it takes its job is told by its exit code, not as a broken pipe."""
    job = msgspec.structs.replace(EVALUATE_JOB, package_folder="p" * 200_000)
    with pytest.raises(WorkerError, match="exit code 7"):
        finish_worker(start_worker(job, [sys.executable, "-c", "import sys; sys.exit(7)"]), EvaluateOutcome)


def test_phases_and_memory_are_watched() -> None:
    """The timeline has the phases in order, sizes that fit each other, and the larger phase larger."""
    sampler = Sampler()
    program = """
import time
for phase, size in (("load", 1 << 20), ("step", 64 << 20)):
    print('{"type":"phase","phase":"%s"}' % phase, flush=True)
    block = b"x" * size
    time.sleep(0.3)
"""
    outcome = finish_worker(worker_that(program + OUTCOME), EvaluateOutcome, sampler=sampler)
    assert outcome.rows == 4
    phases = list(dict.fromkeys(sample.phase for sample in sampler.samples))
    assert [phase for phase in phases if phase != "start"] == ["load", "step"]
    seconds = [sample.seconds for sample in sampler.samples]
    assert seconds == sorted(seconds)
    largest = {phase: max(s.resident_bytes for s in sampler.samples if s.phase == phase) for phase in phases}
    assert largest["step"] > largest["load"] + (56 << 20)
    assert all(s.resident_bytes == s.anonymous_bytes + s.file_bytes for s in sampler.samples)


def test_lines_that_are_no_answer_are_passed_over() -> None:
    """What a library prints to standard output does not spoil the outcome, which comes last."""
    outcome = finish_worker(worker_that("print('*** Error ***\\n\\n{}')\n" + OUTCOME), EvaluateOutcome)
    assert outcome.accuracy == 0.5


@pytest.mark.parametrize(
    "program",
    [
        f"sys.stdout.write('x' * {2 * MAX_OUTPUT_BYTES})",
        "while True: print('y')",
        f'print(\'{{"type":"phase","phase":"a"}}\\n\' * {MAX_PHASES + 1}, flush=True)\nimport time; time.sleep(60)',
    ],
)
def test_a_worker_that_floods_its_parent_is_stopped(program: str) -> None:
    """Too many bytes, in one line or in many, or too many phases end the worker."""
    worker = worker_that(program)
    with pytest.raises(WorkerError, match="wrote over"):
        finish_worker(worker, EvaluateOutcome, timeout_s=30)
    assert worker.process.poll() is not None
