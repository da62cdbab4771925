"""Jobs for the worker process: what is asked of it, what it answers, and how it is started.

The worker is a child process because it alone loads numpy and the engine: the agent stays small, and a
worker that is killed for memory takes nothing with it. A job goes in as one JSON document on standard
input. Lines of JSON come back on standard output: a :class:`PhaseEntered` for each phase, and last the outcome. Other
lines are passed over: onnxruntime prints some there when it is short of memory.
Logs go to standard error. The kernel holds the worker to the job's cap (``edge_runtime.memory.enforcement``), and while
the parent waits it looks at the worker's memory (``edge_runtime.memory.sampler``).
"""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct

from edge_runtime import errors
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import EdgeError, WorkerError
from edge_runtime.memory.plan import ExecutionChoice, Plan
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.package.prepared import MeasuredArithmetic
from edge_runtime.protocol.messages import (
    Bytes,
    Count,
    Identifier,
    MemoryReport,
    PositiveCount,
    Seconds,
    Sha256,
    Task,
    Text,
)

#: Exit code by which the worker says that standard output holds a :class:`Failure`.
FAILURE_EXIT_CODE = 3


class TrainJob(Struct, frozen=True, tag="train"):
    """Train one task; the change is written to ``delta_path`` as safetensors.

    ``cap_bytes`` is what the kernel enforces, ``budget_bytes`` what the plan may use (0: all of the cap).
    ``choice`` fixes how the work is done, for measuring; None lets the plan choose. ``prefix_cache_bytes`` is
    what the prefix cache may take on disk, beside ``delta_path``. ``reference_path`` is the file of the task's
    ``reference``, empty if it has none.
    """

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    state_path: str
    data_path: str
    delta_path: str
    task: Task
    cap_bytes: Bytes
    threads: PositiveCount = 1
    budget_bytes: Bytes = 0
    choice: ExecutionChoice | None = None
    prefix_cache_bytes: Bytes = 0
    engine: EngineName = "onnxruntime"
    reference_path: str = ""


class BinMeasure(Struct, frozen=True):
    """What one part of the prediction took in the worker, in bytes."""

    name: Identifier
    measured_bytes: Bytes


class StepMeasure(Struct, frozen=True):
    """One step: its end, in seconds since the job began, and the memory there: all resident, and anonymous of it."""

    end_s: Seconds
    resident_bytes: Bytes
    anonymous_bytes: Bytes = 0


class TrainOutcome(Struct, frozen=True):
    """What training did; see :class:`edge_runtime.protocol.messages.Result` for the first fields.

    ``bins`` split the peak of the step phase as the plan's prediction does. ``steps`` holds at most ``MAX_STEPS`` of
    them, the first and then evenly. ``prefix_hits`` and ``prefix_misses`` count lookups in the prefix cache.
    ``proportional_*`` are the parts of PSS at the end of the steps, 0 where the kernel does not tell them.
    ``weights_read_bytes`` is what all steps together read of the weights, from memory or disk.
    """

    examples: Count
    steps_applied: Count
    steps_skipped: Count
    mean_loss: float | None
    seconds: Seconds
    memory: MemoryReport
    plan: Plan
    bins: tuple[BinMeasure, ...] = ()
    steps: tuple[StepMeasure, ...] = ()
    prefix_hits: Count = 0
    prefix_misses: Count = 0
    proportional_anonymous_bytes: Bytes = 0
    proportional_file_bytes: Bytes = 0
    weights_read_bytes: Bytes = 0


class EvaluateJob(Struct, frozen=True, tag="evaluate"):
    """Run the primal programs over a data file and count correct answers."""

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    state_path: str
    data_path: str
    sequence_limit: PositiveCount
    cap_bytes: Bytes
    threads: PositiveCount = 1
    engine: EngineName = "onnxruntime"


class EvaluateOutcome(Struct, frozen=True):
    """Accuracy and mean cross-entropy over all rows; for language modelling over all predicted tokens.

    ``tokens`` counts those, 0 for classification. Perplexity is exp(``mean_loss``).
    """

    rows: Count
    accuracy: float
    mean_loss: float
    seconds: Seconds
    memory: MemoryReport
    steps: tuple[StepMeasure, ...] = ()
    tokens: Count = 0


class PrepareJob(Struct, frozen=True, tag="prepare"):
    """Lay a package out for this machine; ``arithmetic`` None measures which is best."""

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    cap_bytes: Bytes
    threads: PositiveCount = 1
    arithmetic: Arithmetic | None = None
    engine: EngineName = "onnxruntime"


class PrepareOutcome(Struct, frozen=True):
    """Which arithmetic was chosen, and every one that was measured."""

    arithmetic: Arithmetic
    candidates: tuple[MeasuredArithmetic, ...]
    seconds: Seconds
    memory: MemoryReport


class Failure(Struct, frozen=True):
    """The worker's own report of an error it raised on purpose; ``kind`` is the class name."""

    kind: Text
    message: Text
    required_bytes: Bytes = 0
    cap_bytes: Bytes = 0


class PhaseEntered(Struct, frozen=True, tag="phase"):
    """The worker says what it does from now on."""

    phase: Identifier


Job = TrainJob | EvaluateJob | PrepareJob
OutcomeT = TypeVar("OutcomeT", TrainOutcome, EvaluateOutcome, PrepareOutcome)


def describe_failure(error: EdgeError) -> Failure:
    """The form in which a worker hands an error to its parent."""
    return Failure(
        kind=type(error).__name__,
        message=str(error)[:2000],
        required_bytes=getattr(error, "required_bytes", 0),
        cap_bytes=getattr(error, "cap_bytes", 0),
    )


def rebuild_error(failure: Failure) -> EdgeError:
    """The error that :func:`describe_failure` was given, in the process that it was handed to."""
    kind = getattr(errors, failure.kind, WorkerError)
    if kind is errors.CapExceededError:
        return errors.CapExceededError(
            failure.message, required_bytes=failure.required_bytes, cap_bytes=failure.cap_bytes
        )
    if isinstance(kind, type) and issubclass(kind, EdgeError) and kind is not errors.RefusedError:
        return kind(failure.message)
    return WorkerError(failure.message)
