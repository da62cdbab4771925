"""One task, or one evaluation, on an open package: what a worker process and a simulated device do alike.

A session is opened with everything the task names; then a plan is chosen for ``session.work``, programs are loaded
(:func:`edge_runtime.training.estimators.executor_of`), and the session runs on them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import msgspec

from edge_runtime.data.examples import Examples
from edge_runtime.execution.executor import Executor
from edge_runtime.memory.plan import ExecutionChoice, Plan, Work, first_segment, preferred_micro_batch
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.messages import ONE_SLICE, MemoryReport, Task, TrainingSettings
from edge_runtime.training.evaluation import Scores
from edge_runtime.training.feature_sums import encode_sums, form_of, sums_bytes
from edge_runtime.training.filtered_directions import decode_reference
from edge_runtime.training.gather_sums import gather_sums
from edge_runtime.training.loop import Trained, train_locally
from edge_runtime.training.methods import check_task
from edge_runtime.training.progress import Keeper
from edge_runtime.training.protected import protect
from edge_runtime.training.sketch import projection_bytes
from edge_runtime.training.step import LocalWork
from edge_runtime.training.trainable import estimated_slices
from edge_runtime.worker.jobs import EvaluateOutcome, TrainOutcome

#: First segment at whose entry a prefix holds a block; the embedding, segment 0, is cheaper to run than to read back.
FIRST_BLOCK_BEHIND_A_BLOCK = 2


@dataclass(frozen=True)
class TaskSession:
    """A task with all that it names, checked against its package.

    Attributes:
        task: settings of the training.
        manifest: the package's manifest.
        values: values of all slices, as the task came with them.
        examples: the device's rows, tokenised.
        work: size of a step's work, for which a plan is chosen.
        reference: values that filtered directions are compared with; None if there are none yet.
    """

    task: Task
    manifest: Manifest
    values: Values
    examples: Examples
    work: Work
    reference: Values | None

    @classmethod
    def open(
        cls,
        task: Task,
        manifest: Manifest,
        values: Values,
        examples: Examples,
        reference: bytes | None = None,
    ) -> TaskSession:
        """Check that the package can do the task.

        Raises:
            ConfigError: the task asks for what the package cannot do.
            PackageError: the task names a slice or a head that the package does not have.
            SliceError: ``reference``, if there is one, does not hold the values that directions are compared with.
        """
        check_task(task, manifest)
        estimated = estimated_slices(task, manifest.slices)
        names = tuple(spec.name for spec in estimated)
        one_slice = task.directions in ONE_SLICE
        work = Work(
            task.batch_size,
            examples.longest,
            task.draws,
            names,
            task.update,
            one_slice=one_slice,
            sketch_bytes=projection_bytes(task, estimated),
        )
        if task.head == "closed_form":
            hides = task.protection is not None and task.protection.hides
            work = sums_work(manifest, task, len(examples.ids), examples.longest, as_vector=hides)
        filtered = None if reference is None else decode_reference(reference, estimated)
        return cls(task, manifest, values, examples, work, filtered)

    @property
    def repeats_a_prefix(self) -> bool:
        """Whether blocks lie before the first slice, whose outputs are worth keeping between steps."""
        first = first_segment(self.manifest, self.work.slices)
        return first is not None and first >= FIRST_BLOCK_BEHIND_A_BLOCK

    def settled(self, plan: Plan) -> TaskSession:
        """This session with the estimator that a plan took, where the task leaves it to the device."""
        if self.task.update != "best":
            return self
        task = msgspec.structs.replace(self.task, update=plan.work.update, draws=plan.work.draws)
        return replace(self, task=task, work=plan.work)

    def train(
        self,
        executor: Executor,
        choice: ExecutionChoice,
        stepped: Callable[[], None] = lambda: None,
        keeper: Keeper | None = None,
        entered: Callable[[Sequence[int]], None] = lambda _: None,
    ) -> Trained:
        """Take the task's steps, or its one pass for sums.

        Args:
            executor: programs of the task's estimator.
            choice: how the work is done.
            stepped: function called after each part.
            keeper: what keeps the progress; None keeps none.
            entered: function called with the positions of rows that entered sums.
        """
        work = LocalWork(executor, self.task, self.examples, choice, self.reference)
        if self.task.head == "closed_form":
            return gather_sums(work, self.values, stepped, keeper, entered)
        return train_locally(work, self.values, stepped, keeper)

    def digest(self, *further: object) -> str:
        """A digest of all that the outcome depends on: task, rows, and what else is named.

        The task names package and values by their digests; how the work is done and by what are for the caller to add.
        """
        found = hashlib.sha256(msgspec.json.encode((self.task, self.examples.sequence_limit, *further)))
        for row, label in zip(self.examples.ids, self.examples.labels or repeat(0), strict=False):
            found.update(struct.pack(f"<{len(row) + 2}q", len(row), label, *row))
        return found.hexdigest()

    def encode(self, trained: Trained, noise_key: bytes) -> bytes:
        """What a result carries of it: safetensors bytes; none at all for the sums of no rows.

        Args:
            trained: what training came to.
            noise_key: secret key of the noise that a protected task adds.
        """
        if self.task.head != "closed_form":
            change = encode_values(trained.delta)
        else:
            change = encode_sums(trained.delta) if trained.delta else b""
        return protect(self.task, self.manifest, change, trained.examples, noise_key)


def train_outcome(trained: Trained, plan: Plan, seconds: float, memory: MemoryReport) -> TrainOutcome:
    """What training came to, without the measurements that only a process of its own can make."""
    return TrainOutcome(
        examples=trained.examples,
        steps_applied=trained.steps_applied,
        steps_skipped=trained.steps_skipped,
        mean_loss=trained.loss_sum / trained.examples if trained.examples else None,
        seconds=seconds,
        memory=memory,
        plan=plan,
    )


def sums_work(
    manifest: Manifest, settings: TrainingSettings, rows: int, longest: int, *, as_vector: bool = False
) -> Work:
    """Size of the work of one pass for a head in closed form, for which a plan is chosen.

    Args:
        manifest: the package's manifest, as the run sees it.
        settings: settings of the run or of the task.
        rows: number of the device's rows.
        longest: length of the longest, in tokens.
        as_vector: whether the sums travel as one vector, with noise or masked.
    """
    form = form_of(settings, manifest)
    memory_bytes = sums_bytes(rows, form.width, form.size, form.labels, as_vector=as_vector)
    return Work(preferred_micro_batch(max(1, rows), longest), longest, 0, (), sums_bytes=memory_bytes)


def evaluation_work(examples: Examples) -> Work:
    """Size of an evaluation's work, for which a plan is chosen."""
    together = preferred_micro_batch(len(examples.ids), examples.longest)
    return Work(together, examples.longest, 0, ())


def evaluate_outcome(
    scores: Scores, manifest: Manifest, rows: int, seconds: float, memory: MemoryReport
) -> EvaluateOutcome:
    """What an evaluation came to, without the measurements that only a process of its own can make."""
    return EvaluateOutcome(
        rows=rows,
        accuracy=scores.accuracy,
        mean_loss=scores.mean_loss,
        seconds=seconds,
        memory=memory,
        tokens=scores.predicted if manifest.task == "causal_lm" else 0,
    )
