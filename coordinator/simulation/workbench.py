"""Where simulated devices do their work: packages opened once, programs and rows kept between tasks.

The steps are the device's own (``edge_runtime``). What differs from a worker process is what a process would throw
away at its end: loaded programs, token ids, outputs of frozen segments. None of it changes a value.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from coordinator.simulation.kept_prefixes import DevicePrefixes, KeptPrefixes
from coordinator.simulation.kept_programs import KeptPrograms
from coordinator.simulation.labelled_rows import LabelledRows
from coordinator.simulation.partition import Share
from edge_runtime.agent.decisions import build_result
from edge_runtime.data.batches import Tokenizer
from edge_runtime.data.examples import Examples
from edge_runtime.data.rows import Row
from edge_runtime.engines.choice import engine_maker
from edge_runtime.engines.engine import Engine
from edge_runtime.execution.executor import Executor
from edge_runtime.memory.best_estimator import best_plan
from edge_runtime.memory.plan import (
    ExecutionChoice,
    Plan,
    Planner,
    WeightsMode,
    Work,
    first_segment,
)
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, decode_values, encode_values
from edge_runtime.protocol.messages import Blocks, MemoryReport, Pooling, Task
from edge_runtime.training.estimators import executor_of
from edge_runtime.training.evaluation import score
from edge_runtime.worker.jobs import EvaluateJob, EvaluateOutcome
from edge_runtime.worker.session import TaskSession, evaluate_outcome, evaluation_work, train_outcome

#: Executors kept of one package. One whose programs carry their own weights is as large as the model.
MOST_EXECUTORS, MOST_WEIGHTY_EXECUTORS = 128, 4
#: Devices whose token ids are kept, a package.
MOST_DEVICES = 20_000


class Job(Struct, frozen=True):
    """One task for one simulated device.

    Attributes:
        task: what is asked.
        rows: what the device holds, as indices into the training file.
        state: safetensors bytes of all slice values.
        reference: safetensors bytes of the values that filtered directions are compared with; empty without them.
        adjoints: whether the device's engine can run adjoint programs.
        cap_bytes: memory that the device grants.
        seconds: virtual, as the result shall tell them.
    """

    task: Task
    rows: Share
    state: bytes
    cap_bytes: int
    seconds: float
    reference: bytes = b""
    adjoints: bool = True


@dataclass(frozen=True)
class BenchSettings:
    """Where packages lie, by digest, each also in ``prepared``; and what the bench may take."""

    packages: Path
    prepared: Path
    threads: int
    prefix_cache_bytes: int


@dataclass
class OpenPackage:
    """A package with what is kept of it."""

    prepared: PreparedPackage
    planner: Planner
    train: list[Row]
    dev: list[Row]
    token_ids: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    examples: OrderedDict[tuple[int, Share], Examples] = field(default_factory=OrderedDict)
    dev_examples: dict[tuple[int, Share | None], Examples] = field(default_factory=dict)
    executors: OrderedDict[tuple[object, ...], tuple[Executor, DevicePrefixes]] = field(
        default_factory=OrderedDict
    )
    tokenizers: dict[int, Tokenizer] = field(default_factory=dict)
    plans: dict[tuple[Work, int], Plan] = field(default_factory=dict)

    def plan(self, work: Work, cap_bytes: int) -> Plan:
        """The plan for some work, thought out once."""
        if (work, cap_bytes) not in self.plans:
            choose = partial(best_plan, self.planner) if work.update == "best" else self.planner.choose
            self.plans[work, cap_bytes] = choose(work, cap_bytes)
        return self.plans[work, cap_bytes]


class FrozenExecutor(Executor):
    """An executor for passes that train nothing, under a head over several blocks: all its segments are the prefix.

    Such passes run on equal values in all rounds of a visit, and over seeds and partitions where no slice is trained.
    So what each block gave is pooled and kept, row by row; the head, its losses and the sums are computed anew, for
    they depend on the round.

    Args:
        prepared: the package, prepared for this machine, with ``head_blocks``.
        engine: engine that loads the programs.
        weights: whether weights stay in memory or pass through it.
        prefixes: store of what the blocks gave; it must be turned to the slices' values before each use.
    """

    def __init__(
        self, prepared: PreparedPackage, engine: Engine, weights: WeightsMode, prefixes: DevicePrefixes
    ) -> None:
        super().__init__(prepared, engine, (), weights, prefixes)
        self.first_trained = len(prepared.manifest.segments_run)


class Workbench:
    """Does tasks and evaluations in this process.

    Args:
        settings: where things are.
        train: rows that devices share.
        dev: rows of evaluations.
    """

    def __init__(self, settings: BenchSettings, train: LabelledRows, dev: LabelledRows) -> None:
        self._settings, self._train, self._dev = settings, train, dev
        self._engine = KeptPrograms(engine_maker("onnxruntime")(settings.threads))
        self._packages: dict[tuple[str, Blocks, Pooling, int], OpenPackage] = {}
        self.prefixes = KeptPrefixes(settings.prefix_cache_bytes)

    def train(self, job: Job) -> bytes:
        """The encoded result of a task, as a device sends it.

        Raises:
            CapExceededError: no plan fits the cap.
            EdgeError: package, state or rows cannot be used.
        """
        task = job.task
        # 1. Open what the task names.
        opened = self._open(task.package, task.features, task.pooling, task.rank)
        manifest = opened.prepared.manifest
        values = decode_values(job.state, manifest.slices)
        examples = self._examples(opened, job.rows, task.sequence_limit)
        session = TaskSession.open(task, manifest, values, examples, job.reference or None)
        # 2. Choose a plan that fits; by proportions alone, so that equal seeds choose alike on every machine.
        work = session.work
        if work.update == "best" and not job.adjoints:
            work = msgspec.structs.replace(work, update="forward")
        plan = opened.plan(work, job.cap_bytes)
        session = session.settled(plan)
        if task.head == "closed_form":
            executor = self._frozen(opened, "train", task.sequence_limit, values, job.rows, plan.choice)
        else:
            executor, prefixes = self._executor(opened, session, plan.choice)
            prefixes.turn_to(_context(opened, session.task, values), job.rows)
        # 3. Local steps.
        trained = session.train(executor, plan.choice)
        # 4. Encode the result.
        outcome = train_outcome(trained, plan, job.seconds, _memory(plan, job.cap_bytes))
        noise_key = hashlib.sha256(f"device noise {task.seed} {task.task_id}".encode()).digest()
        return build_result(task, outcome, session.encode(trained, noise_key))

    def evaluate(self, job: EvaluateJob, state: bytes, rows: Share | None = None) -> EvaluateOutcome:
        """Accuracy and mean loss of slice values on the dev rows; ``seconds`` are not measured.

        Args:
            job: evaluation as a worker takes it, whose paths are not used.
            state: safetensors bytes of the values.
            rows: indices of the dev rows to look at; None for all.
        """
        opened = self._open(job.package_sha256, job.features, job.pooling)
        manifest = opened.prepared.manifest
        values = decode_values(state, manifest.slices)
        examples = self._dev_examples(opened, min(job.sequence_limit, manifest.sequence_limit), rows)
        plan = opened.plan(evaluation_work(examples), job.cap_bytes)
        if manifest.head_blocks:
            every_row = range(len(examples.ids))
            executor = self._frozen(opened, "dev", job.sequence_limit, values, every_row, plan.choice)
        else:
            wanted = ("evaluate", plan.choice.weights)
            executor, _ = self._kept(
                opened, wanted, lambda _: Executor(opened.prepared, self._engine, (), plan.choice.weights)
            )
        scores = score(executor, values, examples, plan.choice.micro_batch)
        return evaluate_outcome(scores, manifest, len(examples.ids), 0.0, _memory(plan, job.cap_bytes))

    def _open(self, sha256: str, blocks: Blocks, pooling: Pooling, rank: int = 0) -> OpenPackage:
        """A package as runs see it whose head reads these blocks, and devices of a rank; 0 for all ranks."""
        seen = (sha256, blocks, pooling, rank)
        if seen not in self._packages:
            folder = self._settings.packages / sha256
            package = Package.open_known(folder, sha256).for_engine("onnxruntime")
            prepared = PreparedPackage.open(
                package, self._settings.prepared / sha256, self._engine.version
            ).with_head(blocks, pooling)
            prepared = prepared.with_rank(rank)
            labels = package.manifest.labels
            planner = Planner(prepared.manifest, prepared.prepared.arithmetic)
            self._packages[seen] = OpenPackage(
                prepared, planner, self._train.indexed(labels), self._dev.indexed(labels)
            )
        return self._packages[seen]

    def _executor(
        self, opened: OpenPackage, session: TaskSession, choice: ExecutionChoice
    ) -> tuple[Executor, DevicePrefixes]:
        task = session.task
        return self._kept(
            opened,
            (task.slices, choice.weights, task.update),
            lambda prefixes: executor_of(
                task, opened.prepared, self._engine, choice, prefixes if session.repeats_a_prefix else None
            ),
        )

    def _frozen(
        self,
        opened: OpenPackage,
        file: Literal["train", "dev"],
        sequence_limit: int,
        values: Values,
        rows: Sequence[int],
        choice: ExecutionChoice,
    ) -> Executor:
        """The executor of a pass that trains nothing, for a head over several blocks; turned to some rows of a file."""
        executor, prefixes = self._kept(
            opened,
            ("frozen", choice.weights),
            lambda prefixes: FrozenExecutor(opened.prepared, self._engine, choice.weights, prefixes),
        )
        manifest = opened.prepared.manifest
        seen = (opened.prepared.package.sha256, manifest.head_blocks, manifest.head_features)
        prefixes.turn_to((*seen, file, sequence_limit, _digest(manifest, values)), rows)
        return executor

    def _kept(
        self, opened: OpenPackage, wanted: tuple[object, ...], make: Callable[[DevicePrefixes], Executor]
    ) -> tuple[Executor, DevicePrefixes]:
        """The executor that is wanted, loaded on first use; the one not used for longest makes room."""
        if wanted not in opened.executors:
            prefixes = DevicePrefixes(self.prefixes)
            opened.executors[wanted] = (make(prefixes), prefixes)
            weighty = any(
                opened.prepared.variant(p).bound for p in opened.prepared.manifest.programs.values()
            )
            if len(opened.executors) > (MOST_WEIGHTY_EXECUTORS if weighty else MOST_EXECUTORS):
                opened.executors.popitem(last=False)
        opened.executors.move_to_end(wanted)
        return opened.executors[wanted]

    def _examples(self, opened: OpenPackage, rows: Share, sequence_limit: int) -> Examples:
        """A device's rows as token ids; each row is tokenised once, whoever holds it."""
        manifest = opened.prepared.manifest
        limit = min(sequence_limit, manifest.sequence_limit)
        if (limit, rows) not in opened.examples:
            missing = [row for row in rows if (limit, row) not in opened.token_ids]
            encoded = self._encode(opened, [opened.train[row] for row in missing], limit)
            opened.token_ids.update(zip([(limit, row) for row in missing], encoded, strict=True))
            opened.examples[limit, rows] = Examples(
                [opened.token_ids[limit, row] for row in rows],
                [opened.train[row].label for row in rows] if manifest.labels else None,
                manifest.pad_token_id,
                limit,
            )
            if len(opened.examples) > MOST_DEVICES:
                opened.examples.popitem(last=False)
        return opened.examples[limit, rows]

    def _dev_examples(self, opened: OpenPackage, limit: int, rows: Share | None) -> Examples:
        manifest = opened.prepared.manifest
        if (limit, rows) not in opened.dev_examples:
            chosen = opened.dev if rows is None else [opened.dev[row] for row in rows]
            opened.dev_examples[limit, rows] = Examples(
                self._encode(opened, chosen, limit),
                [row.label for row in chosen] if manifest.labels else None,
                manifest.pad_token_id,
                limit,
            )
        return opened.dev_examples[limit, rows]

    def _encode(self, opened: OpenPackage, rows: Sequence[Row], limit: int) -> list[list[int]]:
        package = opened.prepared.package
        if limit not in opened.tokenizers:
            opened.tokenizers[limit] = Tokenizer(package.path(package.manifest.tokenizer), limit)
        return opened.tokenizers[limit].encode(rows, 1 if package.manifest.labels else 2)


def _context(opened: OpenPackage, task: Task, values: Values) -> tuple[object, ...]:
    """What the outputs of the segments before the first trained slice depend on, beside the row."""
    manifest = opened.prepared.manifest
    first = first_segment(manifest, task.slices) or 0
    return (
        task.package,
        first,
        task.sequence_limit,
        task.update == "backprop",
        _digest(manifest, values, first),
    )


def _digest(manifest: Manifest, values: Values, first: int | None = None) -> bytes:
    """Digest of the slices beside the head, or of those before the segment ``first`` alone."""
    digest = hashlib.sha256()
    for spec in manifest.slices:
        if spec.kind != "head" and (first is None or min(spec.segments) < first):
            digest.update(encode_values({n: v for n, v in values.items() if n.startswith(f"{spec.name}/")}))
    return digest.digest()


def _memory(plan: Plan, cap_bytes: int) -> MemoryReport:
    """Predicted memory; measured there is none, for all devices share a process."""
    return MemoryReport(plan.peak.total_bytes, 0, cap_bytes)
