"""The measured half of a profile: prepare the package, train in a worker under the cap, try other ways."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from edge_runtime.errors import (
    OutOfMemoryError,
)
from edge_runtime.figures import size
from edge_runtime.memory.enforcement import EnforcedBy
from edge_runtime.memory.meter import ProcessMemory, read_memory
from edge_runtime.memory.plan import USABLE_SHARE, ExecutionChoice, Plan, Planner, WeightsMode
from edge_runtime.memory.sampler import Sampler
from edge_runtime.package.prepared import prepared_beside, read_prepared
from edge_runtime.profile.comparisons import backpropagation, inference_alone
from edge_runtime.profile.document import Comparison
from edge_runtime.profile.request import PlanRequest
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.worker.jobs import PrepareJob, TrainJob, TrainOutcome
from edge_runtime.worker.process import RunningWorker, ensure_prepared, finish_worker

#: Size of the prefix cache that devices have by default (``prefix_cache`` in device.toml).
PREFIX_CACHE_BYTES = 256 << 20
#: Stands in for a signature, which the worker does not check: no coordinator sends this task.
_UNSIGNED = "A" * 86 + "=="


@dataclass(frozen=True)
class Settings:
    """What to profile, and where the report goes.

    Attributes:
        request: package, cap and work.
        data: path of a data file like a device's.
        steps: number of steps of the task.
        threads: number of threads of the engine.
        output: path of the report without its ending.
        command: command line that repeats the measurement.
        weights: forced place of the weights; None leaves it to the plan.
        micro_batch: forced number of examples at a time; None leaves it to the plan.
        against: path of an earlier report to compare with; None compares with none.
        tolerance: growth of the peak over the earlier report that is accepted, as a share.
        model: path of the Hugging Face folder that the package was made from, for the comparison with backpropagation;
            None leaves that out.
        prepared_folder: path of the prepared folder, which need not exist yet; None takes the place beside the package.
    """

    request: PlanRequest
    data: Path
    steps: int
    threads: int
    output: Path
    command: str
    weights: WeightsMode | None = None
    micro_batch: int | None = None
    against: Path | None = None
    tolerance: float = 0.05
    model: Path | None = None
    prepared_folder: Path | None = None


class Observer(Sampler):
    """A sampler that also notes when each phase began, and what a look at the worker costs.

    Attributes:
        process_id: id of the worker's process.
        looks: number of looks so far.
        entered_s: start of each phase, in seconds after the worker's start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process_id = os.getpid()
        self.looks = 0
        self.entered_s: dict[str, float] = {}
        self._costs_s: list[float] = []

    def add(self, seconds: float, memory: ProcessMemory) -> None:
        """Take in one look. At the first of each phase, look once more and time it."""
        super().add(seconds, memory)
        self.looks += 1
        if self.phase not in self.entered_s:
            self.entered_s[self.phase] = seconds
            started = time.perf_counter()
            read_memory(self.process_id)
            self._costs_s.append(time.perf_counter() - started)

    @property
    def look_s(self) -> float:
        """Seconds that a look takes, the mean of those that were timed."""
        return sum(self._costs_s) / max(1, len(self._costs_s))


@dataclass
class ProfileRun:
    """One profiled task and what came of it.

    Attributes:
        job: job of the task.
        planner: planner for the package on this machine.
        request: package, cap and work, with the package prepared.
        observer: the worker's phases and memory over time.
        outcome: the worker's answer; None if it was killed for memory.
        killed: error that says so; None if it was not killed.
        enforced_by: means that held the worker to the cap.
        enforcement_note: reason why no better means did; empty if the best one did.
        ended_s: the worker's end, in seconds after its start.
        notes: other things that a reader should know.
    """

    job: TrainJob
    planner: Planner
    request: PlanRequest
    observer: Observer = field(default_factory=Observer)
    outcome: TrainOutcome | None = None
    killed: OutOfMemoryError | None = None
    enforced_by: EnforcedBy = "none"
    enforcement_note: str = ""
    ended_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """The plan that the worker chose.

        If it was killed and cannot tell, this is the plan that it must have chosen for the requested sequence.
        """
        if self.outcome is not None:
            return self.outcome.plan
        if self.job.choice is not None:
            return self.planner.plan(self.request.work, self.job.choice)
        return self.planner.choose(self.request.work, self.request.cap_bytes)


def prepared_folder(settings: Settings) -> Path:
    return settings.prepared_folder or prepared_beside(settings.request.package.folder)


def prepare_for_request(settings: Settings) -> PlanRequest:
    """Prepare the package for this machine; the result is the request with the package prepared."""
    package, folder = settings.request.package, prepared_folder(settings)
    ensure_prepared(
        PrepareJob(
            package_folder=str(package.folder.resolve()),
            package_sha256=package.sha256,
            prepared_folder=str(folder.resolve()),
            cap_bytes=settings.request.cap_bytes,
            threads=settings.threads,
            engine=settings.request.engine,
        )
    )
    return replace(settings.request, prepared=read_prepared(folder), unprepared="")


def new_run(settings: Settings, request: PlanRequest, rows: int, folder: Path) -> ProfileRun:
    """The task as a coordinator would send it, not started yet.

    Args:
        settings: task to run, and place of the report.
        request: package, cap and work, with the package prepared.
        rows: number of rows of the data.
        folder: folder for the files that the task writes.
    """
    package, work, notes = request.package, request.work, []
    if rows < work.batch_size:
        notes.append(f"The data has {rows} rows: they are the batch, instead of {work.batch_size}.")
        work = msgspec.structs.replace(work, batch_size=rows)
        request = replace(request, work=work)
    planner = request.planner()
    choice = _forced(planner, request, settings.weights, settings.micro_batch)
    if choice is not None:
        notes.append("How the work is done was forced by the command line, not chosen to fit.")
    task = Task(
        task_id="profile",
        run_id="profile",
        round=0,
        slot=0,
        seed=0,
        package=package.sha256,
        package_signature=_UNSIGNED,
        state=package.manifest.files[package.manifest.initial_state].sha256,
        slices=work.slices,
        train_head=package.manifest.head is not None,
        steps=settings.steps,
        batch_size=work.batch_size,
        draws=work.draws,
        sequence_limit=work.sequence,
        optimizer=LocalOptimizer(),
        required_bytes=0,
        deadline_s=0.0,
        update=work.update,
    )
    job = TrainJob(
        package_folder=str(package.folder.resolve()),
        package_sha256=package.sha256,
        prepared_folder=str(prepared_folder(settings).resolve()),
        state_path=str(package.path(package.manifest.initial_state).resolve()),
        data_path=str(settings.data.resolve()),
        delta_path=str(folder / "change.safetensors"),
        task=task,
        cap_bytes=request.cap_bytes,
        threads=settings.threads,
        choice=choice,
        prefix_cache_bytes=PREFIX_CACHE_BYTES,
        engine=request.engine,
    )
    return ProfileRun(job, planner, request, notes=notes)


def _forced(
    planner: Planner, request: PlanRequest, weights: WeightsMode | None, micro_batch: int | None
) -> ExecutionChoice | None:
    """The fastest choice with the forced parts that fits, or the smallest if none fits; None if nothing is forced."""
    if weights is None and micro_batch is None:
        return None
    ways = {
        msgspec.structs.replace(
            way, weights=weights or way.weights, micro_batch=micro_batch or way.micro_batch
        ): None
        for way in planner.choices(request.work)
    }
    plans = [planner.plan(request.work, way) for way in ways]
    usable = int(request.cap_bytes * USABLE_SHARE)
    fitting = [plan for plan in plans if plan.peak.total_bytes <= usable]
    if fitting:
        return min(fitting, key=lambda plan: plan.step_s or 0.0).choice
    return min(plans, key=lambda plan: plan.peak.total_bytes).choice


def train_measured(run: ProfileRun, launch: Callable[[TrainJob], RunningWorker]) -> None:
    """Run the task in a worker, and record how it went."""
    worker = launch(run.job)
    run.observer.process_id = worker.process.pid
    run.enforced_by, run.enforcement_note = worker.memory_limit.enforced_by, worker.memory_limit.note
    try:
        run.outcome = finish_worker(worker, TrainOutcome, sampler=run.observer)
    except OutOfMemoryError as error:
        run.killed = error
        run.notes.append(f"{str(error)[:1].upper()}{str(error)[1:]}.")
        return
    finally:
        run.ended_s = time.monotonic() - worker.started_s
    work, request = run.outcome.plan.work, run.request.work
    if work.sequence < request.sequence:
        run.notes.append(
            f"The longest row has {work.sequence} tokens: that is the sequence, instead of the {request.sequence} "
            f"asked for."
        )
    shared = run.outcome.proportional_anonymous_bytes, run.outcome.proportional_file_bytes
    if any(shared):
        anonymous, file = (size(count) for count in shared)
        run.notes.append(
            f"Proportional set size when the steps had ended: {anonymous} anonymous and {file} of files, where a "
            f"page that other processes hold as well counts by its share."
        )
    floor_bytes = run.outcome.memory.floor_bytes
    run.planner = run.request.planner(floor_bytes)


def compare_ways(run: ProfileRun, model: Path | None, folder: Path) -> list[Comparison]:
    """Other ways to do the same work. Notes name those that are not to be had here."""
    found = []
    for way, note in (
        inference_alone(run.job, folder),
        backpropagation(run.job, model),
    ):
        if way is not None:
            found.append(way)
        if note:
            run.notes.append(note)
    return found
