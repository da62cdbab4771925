"""Jobs for the worker process: what it is asked to do, and what it answers.

The worker is a child process because it alone loads numpy and the engine. So the agent stays small, and a worker that
is killed for memory takes nothing else with it. A job goes in as one JSON document on standard input. Lines of JSON
come back on standard output: a :class:`PhaseEntered` for each phase, and last the outcome. Other lines are passed over,
because onnxruntime prints some there when it is short of memory. Logs go to standard error. The kernel holds the worker
to the job's cap (``edge_runtime.memory.enforcement``), and the parent looks at the worker's memory while it waits
(``edge_runtime.memory.sampler``).
"""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct

from edge_runtime import errors
from edge_runtime.data.reading import Reading
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import EdgeError, WorkerError
from edge_runtime.memory.plan import ExecutionChoice, Plan
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.package.prepared import MeasuredArithmetic
from edge_runtime.protocol.messages import (
    Blocks,
    Bytes,
    Count,
    Identifier,
    MemoryReport,
    Pooling,
    PositiveCount,
    Seconds,
    Sha256,
    Task,
    Text,
)

#: Exit code by which the worker says that standard output holds a :class:`Failure`.
FAILURE_EXIT_CODE = 3


class HandedIn(Struct, frozen=True):
    """Sums that a device has handed in before.

    Attributes:
        record_path: path of the record of them (:class:`edge_runtime.training.handed_in.Record`).
        bytes: size of them.
    """

    record_path: str
    bytes: Bytes


class TrainJob(Struct, frozen=True, tag="train"):
    """Train one task.

    Attributes:
        package_folder: path of the package folder.
        package_sha256: digest that names the package.
        prepared_folder: path of the prepared folder.
        state_path: path of the file with the values of all slices.
        data_path: path of the data file.
        delta_path: path that the change is written to, as safetensors.
        task: settings of the training.
        cap_bytes: memory that the kernel holds the worker to.
        threads: number of threads of the engine.
        budget_bytes: memory that the plan may use; 0 takes all of the cap.
        choice: forced choice of how the work is done, for measurements; None lets the plan choose.
        prefix_cache_bytes: size that the prefix cache may have, in a file beside ``delta_path``.
        engine: name of the engine.
        reference_path: path of the file with the task's ``reference``; empty if it has none.
        reading: which rows of the data file are trained on, and how they are found.
        progress_path: path of the file that keeps how far the task has come, for a worker that is told to stop; empty
            keeps nothing.
        handed_in: sums from before, of which only what has changed since is handed in; None if there are none.
        rows_path: path that digests of the rows in a device's sums are written to; empty writes none.
        row_key: key of these digests, in hex.
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
    reading: Reading = Reading()
    progress_path: str = ""
    handed_in: HandedIn | None = None
    rows_path: str = ""
    row_key: str = ""


class BinMeasure(Struct, frozen=True):
    """Measured size of one part of the prediction.

    Attributes:
        name: name of the part.
        measured_bytes: memory that it took in the worker.
    """

    name: Identifier
    measured_bytes: Bytes


class StepMeasure(Struct, frozen=True):
    """Time and memory at the end of one step.

    Attributes:
        end_s: end of the step, in seconds since the job began.
        resident_bytes: resident memory.
        anonymous_bytes: anonymous memory, a part of the resident.
    """

    end_s: Seconds
    resident_bytes: Bytes
    anonymous_bytes: Bytes = 0


class TrainOutcome(Struct, frozen=True):
    """What training did.

    Attributes:
        examples: number of rows that entered applied steps.
        steps_applied: number of steps whose gradient was taken.
        steps_skipped: number of steps left out because something was not finite.
        mean_loss: mean loss of these rows; None if no step was applied.
        seconds: time that the task took.
        memory: predicted and measured memory.
        plan: the plan that was followed.
        bins: measured parts of the peak of the step phase, split as in the plan's prediction.
        steps: time and memory of at most ``MAX_STEPS`` steps, evenly spaced from the first.
        prefix_hits: number of examples found in the prefix cache.
        prefix_misses: number of examples not found in the prefix cache.
        proportional_anonymous_bytes: anonymous part of PSS after the last step; 0 where the kernel does not tell it.
        proportional_file_bytes: file-backed part of PSS after the last step; 0 where the kernel does not tell it.
        weights_read_bytes: bytes of weights that all steps together read, from memory or disk.
        draws_run: number of draws that segments ran, added up over steps, segments and examples; 0 where nothing is
            estimated by forward mode.
        draws_skipped: number of draws that segments did not run because they move nothing there or before.
        stands: whether sums that were handed in before stand; if not, they are to be taken off.
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
    draws_run: Count = 0
    draws_skipped: Count = 0
    stands: bool = True


class EvaluateJob(Struct, frozen=True, tag="evaluate"):
    """Run the primal programs over a data file and count correct answers.

    Attributes:
        package_folder: path of the package folder.
        package_sha256: digest that names the package.
        prepared_folder: path of the prepared folder.
        state_path: path of the file with the values of all slices.
        data_path: path of the data file.
        sequence_limit: largest number of tokens of a row.
        cap_bytes: memory that the kernel holds the worker to.
        threads: number of threads of the engine.
        engine: name of the engine.
        features: numbers of the blocks that the head reads; empty for the package's own features.
        pooling: way to make one vector of a text's hidden states, for ``features``.
        reading: which rows of the data file are evaluated, and how they are found.
    """

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    state_path: str
    data_path: str
    sequence_limit: PositiveCount
    cap_bytes: Bytes
    threads: PositiveCount = 1
    engine: EngineName = "onnxruntime"
    features: Blocks = ()
    pooling: Pooling = "package"
    reading: Reading = Reading()


class EvaluateOutcome(Struct, frozen=True):
    """Accuracy and loss, over rows for classification and over predicted tokens for language modelling.

    Attributes:
        rows: number of rows.
        accuracy: share of correct predictions.
        mean_loss: mean cross-entropy; perplexity is its exponential.
        seconds: time that the evaluation took.
        memory: predicted and measured memory.
        steps: time and memory after groups of rows.
        tokens: number of predicted tokens; 0 for classification.
    """

    rows: Count
    accuracy: float
    mean_loss: float
    seconds: Seconds
    memory: MemoryReport
    steps: tuple[StepMeasure, ...] = ()
    tokens: Count = 0


class CountJob(Struct, frozen=True, tag="count"):
    """Read all rows and say what they are like.

    Attributes:
        data_path: path of the data.
        reading: which rows, and how they are found.
        cap_bytes: memory that the kernel holds the worker to.
    """

    data_path: str
    reading: Reading
    cap_bytes: Bytes


class CountOutcome(Struct, frozen=True):
    """What rows are like, without any of their values.

    Attributes:
        rows: number of rows.
        labelled: whether they have labels.
        numbered: whether labels are whole numbers.
        unused_columns: number of further columns.
        memory: measured memory.
    """

    rows: Count
    labelled: bool
    numbered: bool
    unused_columns: Count
    memory: MemoryReport


class PrepareJob(Struct, frozen=True, tag="prepare"):
    """Prepare a package for this machine.

    Attributes:
        package_folder: path of the package folder.
        package_sha256: digest that names the package.
        prepared_folder: path of the prepared folder, which is replaced.
        cap_bytes: memory that the kernel holds the worker to.
        threads: number of threads of the engine.
        arithmetic: arithmetic to prepare for; None measures which is best.
        engine: name of the engine.
    """

    package_folder: str
    package_sha256: Sha256
    prepared_folder: str
    cap_bytes: Bytes
    threads: PositiveCount = 1
    arithmetic: Arithmetic | None = None
    engine: EngineName = "onnxruntime"


class PrepareOutcome(Struct, frozen=True):
    """The arithmetic that a package was prepared in.

    Attributes:
        arithmetic: arithmetic that was chosen.
        candidates: all arithmetics that were measured.
        seconds: time that preparing took.
        memory: measured memory.
    """

    arithmetic: Arithmetic
    candidates: tuple[MeasuredArithmetic, ...]
    seconds: Seconds
    memory: MemoryReport


class Failure(Struct, frozen=True):
    """The worker's own report of an error that it raised on purpose.

    Attributes:
        kind: name of the error's class.
        message: message of the error.
        required_bytes: memory that the work needs, of a CapExceededError; else 0.
        cap_bytes: memory that the operator granted, of a CapExceededError; else 0.
    """

    kind: Text
    message: Text
    required_bytes: Bytes = 0
    cap_bytes: Bytes = 0


class PhaseEntered(Struct, frozen=True, tag="phase"):
    """The worker begins a phase.

    Attributes:
        phase: name of the phase.
    """

    phase: Identifier


Job = TrainJob | EvaluateJob | PrepareJob | CountJob
OutcomeT = TypeVar("OutcomeT", TrainOutcome, EvaluateOutcome, PrepareOutcome, CountOutcome)


def describe_failure(error: EdgeError) -> Failure:
    """The report by which a worker hands an error to its parent."""
    return Failure(
        kind=type(error).__name__,
        message=str(error)[:2000],
        required_bytes=getattr(error, "required_bytes", 0),
        cap_bytes=getattr(error, "cap_bytes", 0),
    )


def rebuild_error(failure: Failure) -> EdgeError:
    """The error that a worker raised, made again in its parent from the report."""
    kind = getattr(errors, failure.kind, WorkerError)
    if kind is errors.CapExceededError:
        return errors.CapExceededError(
            failure.message, required_bytes=failure.required_bytes, cap_bytes=failure.cap_bytes
        )
    if isinstance(kind, type) and issubclass(kind, EdgeError) and kind is not errors.RefusedError:
        return kind(failure.message)
    return WorkerError(failure.message)
