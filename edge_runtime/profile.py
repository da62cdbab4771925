"""Profile a task: run it in an enforced worker and write the memory report, :func:`profile_package`.

This process stays small, without numpy and the engine: workers do the work, and it looks at them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edge_runtime.asked import MAX_STEPS, MAX_THREADS, Asked, beside, check_range
from edge_runtime.durable import write_durably
from edge_runtime.errors import (
    BudgetError,
    ConfigError,
    DataError,
    EdgeError,
    OutOfMemoryError,
    RegressionError,
)
from edge_runtime.jobs import (
    PrepareJob,
    RunningWorker,
    TrainJob,
    TrainOutcome,
    ensure_prepared,
    finish_worker,
    start_worker,
)
from edge_runtime.messages import LocalOptimizer, Task
from edge_runtime.meter import ProcessMemory, read_memory
from edge_runtime.plan import USABLE_SHARE, Choice, Plan, Planner, WeightsMode
from edge_runtime.prepared import PREPARED, read_prepared
from edge_runtime.profile_comparisons import backpropagation, inference_alone
from edge_runtime.profile_document import (
    MAX_DOCUMENT_BYTES,
    Comparison,
    Difference,
    Judge,
    Measuring,
    Profile,
    Sample,
    Work,
    compare,
    decode_profile,
    encode_profile,
    thin,
)
from edge_runtime.profile_facts import (
    FEWEST_CHECKED_STEPS,
    bins,
    growth,
    phase_peaks,
    step_seconds,
    tensors,
)
from edge_runtime.profile_identity import identify
from edge_runtime.profile_page import render_page
from edge_runtime.profile_text import difference_line, duration, failure_lines, render_text
from edge_runtime.rows import count_rows
from edge_runtime.watch import Watch
from edge_runtime.what_if import what_if

#: Samples of the timeline that a report keeps.
MOST_SAMPLES = 400
#: As devices have it by default (``prefix_cache`` in device.toml).
PREFIX_CACHE_BYTES = 256 << 20
#: In the place of a signature that the worker does not look at: no coordinator sends this task.
_UNSIGNED = "A" * 86 + "=="


@dataclass(frozen=True)
class Settings:
    """What to profile, and where the report goes.

    Attributes:
        data: rows as a device has them. steps: of the task. threads: of the engine.
        weights, micro_batch: force how the work is done; None leaves it to the plan.
        output: path of the report without its ending.
        against: an earlier report. tolerance: growth of the peak over it that is accepted, as a share.
        model: the Hugging Face folder the package was made from, to compare with backpropagation.
        prepared_folder: where the package is, or will be, prepared; None takes the place beside it.
        command: repeats the measurement.
    """

    asked: Asked
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


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        difference: against the earlier report, if one was given and is of the same work.
        text: the whole report. paths: of page, document and text.
        error: why the command must not end well; None if the run kept to its budget and did not regress.
    """

    profile: Profile
    difference: Difference | None
    text: str
    paths: tuple[Path, ...]
    error: EdgeError | None


class Observer(Watch):
    """A watch that also notes when each phase began, and what looking costs."""

    def __init__(self) -> None:
        super().__init__()
        self.process_id = os.getpid()
        self.looks = 0
        self.entered_s: dict[str, float] = {}
        self._costs_s: list[float] = []

    def add(self, seconds: float, memory: ProcessMemory) -> None:
        """Take in one look; at the first of each phase, time another."""
        super().add(seconds, memory)
        self.looks += 1
        if self.phase not in self.entered_s:
            self.entered_s[self.phase] = seconds
            started = time.perf_counter()
            read_memory(self.process_id)
            self._costs_s.append(time.perf_counter() - started)

    @property
    def look_s(self) -> float:
        """Seconds that a look takes, the mean of those timed."""
        return sum(self._costs_s) / max(1, len(self._costs_s))


@dataclass
class Run:
    """One profiled task and what came of it.

    Attributes:
        outcome: None if the worker was ``killed`` for memory.
        judge, judge_note: who held it to the cap, and why none better.
        ended_s: when the worker had ended, after its start.
        notes: what a reader should know.
    """

    job: TrainJob
    planner: Planner
    asked: Asked
    observer: Observer = field(default_factory=Observer)
    outcome: TrainOutcome | None = None
    killed: OutOfMemoryError | None = None
    judge: Judge = "none"
    judge_note: str = ""
    ended_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """As the worker chose it; where it was killed, as it must have chosen for the sequence that was asked."""
        if self.outcome is not None:
            return self.outcome.plan
        if self.job.choice is not None:
            return self.planner.plan(self.asked.work, self.job.choice)
        return self.planner.choose(self.asked.work, self.asked.cap_bytes)


def profile_package(settings: Settings, launch: Callable[[TrainJob], RunningWorker] = start_worker) -> Report:
    """Run a task, compare it with other ways, and write the report.

    What can be refused is refused before anything runs. The files are written last, each as a whole.

    Args:
        settings: what to run.
        launch: starts the worker.

    Raises:
        ConfigError: a setting cannot be used.
        EdgeError: the package cannot be prepared, or the task was refused or failed otherwise than for memory.
    """
    # 1. Check what can be checked.
    old = _earlier(settings.against)
    rows = _check(settings)
    identify(
        settings.asked.package, settings.asked.planner().arithmetic, settings.command, settings.asked.engine
    )
    settings.asked.package.verify_files()

    # 2. Prepare the package, run the task, and what it is compared with.
    asked = _prepare(settings)
    with tempfile.TemporaryDirectory(prefix="edge-profile-") as name:
        run = _run(settings, asked, rows, Path(name))
        _train(run, launch)
        ways = _compare_ways(run, settings.model, Path(name))

    # 3. Write it down.
    profile = _fill(run, settings.command, ways)
    difference, unlike = _against(old, profile, settings.tolerance)
    text, paths = _write(profile, difference, settings.output)
    error = run.killed or _broken_budget(profile) or unlike or _regression(difference)
    return Report(profile, difference, text, paths, error)


# --- before ---------------------------------------------------------------------------------------------------


def _earlier(path: Path | None) -> Profile | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return decode_profile(file.read(MAX_DOCUMENT_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"cannot read the earlier report {path}: {error.strerror}") from error


def _check(settings: Settings) -> int:
    """Refuse what cannot be run or written; returns the number of rows."""
    check_range("--steps", settings.steps, MAX_STEPS)
    check_range("--threads", settings.threads, MAX_THREADS)
    if settings.micro_batch is not None:
        check_range("--micro-batch", settings.micro_batch, settings.asked.work.batch_size)
    if not 0 <= settings.tolerance <= 10:
        raise ConfigError(f"--tolerance is {settings.tolerance}; it may be 0 to 10")
    if not settings.output.name or not settings.output.parent.is_dir():
        raise ConfigError(f"--output {settings.output}: there is no folder {settings.output.parent}")
    if settings.model is not None and not settings.model.is_dir():
        raise ConfigError(f"--model {settings.model} is not a folder")
    folder = _prepared_folder(settings)
    if folder.exists() and not (folder / PREPARED).is_file():
        raise ConfigError(
            f"{folder} holds no prepared package, and would be replaced by one; name another place"
        )
    rows = count_rows(settings.data)
    if rows == 0:
        raise DataError(f"{settings.data} is empty; it needs at least one row")
    return rows


def _prepared_folder(settings: Settings) -> Path:
    return settings.prepared_folder or beside(settings.asked.package.folder)


def _prepare(settings: Settings) -> Asked:
    """What was asked, with the package prepared for this machine."""
    package, folder = settings.asked.package, _prepared_folder(settings)
    ensure_prepared(
        PrepareJob(
            package_folder=str(package.folder.resolve()),
            package_sha256=package.sha256,
            prepared_folder=str(folder.resolve()),
            cap_bytes=settings.asked.cap_bytes,
            threads=settings.threads,
            engine=settings.asked.engine,
        )
    )
    return replace(settings.asked, prepared=read_prepared(folder), unprepared="")


# --- the task -------------------------------------------------------------------------------------------------


def _run(settings: Settings, asked: Asked, rows: int, folder: Path) -> Run:
    """The task as a coordinator would have sent it, not started yet; ``folder`` is for what it writes."""
    package, work, notes = asked.package, asked.work, []
    if rows < work.batch_size:
        notes.append(f"The data has {rows} rows: they are the batch, instead of {work.batch_size}.")
        work = msgspec.structs.replace(work, batch_size=rows)
        asked = replace(asked, work=work)
    planner = asked.planner()
    choice = _forced(planner, asked, settings.weights, settings.micro_batch)
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
        prepared_folder=str(_prepared_folder(settings).resolve()),
        state_path=str(package.path(package.manifest.initial_state).resolve()),
        data_path=str(settings.data.resolve()),
        change_path=str(folder / "change.safetensors"),
        task=task,
        cap_bytes=asked.cap_bytes,
        threads=settings.threads,
        choice=choice,
        prefix_cache_bytes=PREFIX_CACHE_BYTES,
        engine=asked.engine,
    )
    return Run(job, planner, asked, notes=notes)


def _forced(
    planner: Planner, asked: Asked, weights: WeightsMode | None, micro_batch: int | None
) -> Choice | None:
    """The fastest way with what is forced that fits, or the smallest if none does; None if nothing is forced."""
    if weights is None and micro_batch is None:
        return None
    ways = {
        msgspec.structs.replace(
            way, weights=weights or way.weights, micro_batch=micro_batch or way.micro_batch
        ): None
        for way in planner.choices(asked.work)
    }
    plans = [planner.plan(asked.work, way) for way in ways]
    usable = int(asked.cap_bytes * USABLE_SHARE)
    fitting = [plan for plan in plans if plan.peak.total_bytes <= usable]
    if fitting:
        return min(fitting, key=lambda plan: plan.step_s or 0.0).choice
    return min(plans, key=lambda plan: plan.peak.total_bytes).choice


def _train(run: Run, launch: Callable[[TrainJob], RunningWorker]) -> None:
    """Run the task and take note of how it went."""
    worker = launch(run.job)
    run.observer.process_id = worker.process.pid
    run.judge, run.judge_note = worker.cage.judge, worker.cage.note
    try:
        run.outcome = finish_worker(worker, TrainOutcome, watch=run.observer)
    except OutOfMemoryError as error:
        run.killed = error
        run.notes.append(f"{str(error)[:1].upper()}{str(error)[1:]}.")
        return
    finally:
        run.ended_s = time.monotonic() - worker.started_s
    work, asked = run.outcome.plan.work, run.asked.work
    if work.sequence < asked.sequence:
        run.notes.append(
            f"The longest row has {work.sequence} tokens: that is the sequence, instead of the {asked.sequence} "
            f"asked for."
        )
    shared = run.outcome.proportional_anonymous_bytes, run.outcome.proportional_file_bytes
    if any(shared):
        anonymous, file = (f"{size / (1 << 20):.1f} MiB" for size in shared)
        run.notes.append(
            f"Proportional set size when the steps had ended: {anonymous} anonymous and {file} of files, where a "
            f"page that other processes hold as well counts by its share."
        )
    floor_bytes = run.outcome.memory.floor_bytes
    run.planner = run.asked.planner(floor_bytes)


def _compare_ways(run: Run, model: Path | None, folder: Path) -> list[Comparison]:
    """Other ways to do the same work; notes tell of those that could not be had."""
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


# --- the report -----------------------------------------------------------------------------------------------


def _fill(run: Run, command: str, ways: list[Comparison]) -> Profile:
    """The report of a finished or killed task."""
    plan, asked, outcome, watch = run.plan, run.asked, run.outcome, run.observer
    steps = outcome.steps_applied + outcome.steps_skipped if outcome else 0
    kept = outcome.steps if outcome else ()
    phases = outcome.memory.phases if outcome else _sampled_peaks(watch)
    peak_bytes = outcome.memory.high_water_bytes if outcome else max([1, *phases.values()])
    step_s = step_seconds(kept, steps)
    checked = growth(kept, steps)
    if checked is None and outcome is not None:
        run.notes.append(
            f"No leak check: it needs {FEWEST_CHECKED_STEPS} steps after the warm-up, so at least "
            f"{FEWEST_CHECKED_STEPS * 5 // 4} steps."
        )
    samples = tuple(
        Sample(s.seconds, s.phase, s.resident_bytes, s.anonymous_bytes, s.file_bytes) for s in watch.samples
    )
    this = Comparison(
        "this task", peak_bytes, step_s, "killed by the kernel" if run.killed else "measured above"
    )
    return Profile(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        identity=identify(asked.package, run.planner.arithmetic, command, asked.engine),
        work=Work(
            batch_size=plan.work.batch_size,
            micro_batch=plan.choice.micro_batch,
            sequence=plan.work.sequence,
            draws=plan.work.draws,
            slices=plan.work.slices,
            weights=plan.choice.weights,
            steps=steps,
            threads=run.job.threads,
            gave_up=plan.gave_up,
            update=plan.work.update,
        ),
        cap_bytes=asked.cap_bytes,
        peak_bytes=peak_bytes,
        charged_peak_bytes=_charged(run),
        judge=run.judge,
        judge_note=f"{run.judge_note[:1].upper()}{run.judge_note[1:]}." if run.judge_note else "",
        predicted_peak_bytes=plan.peak.total_bytes,
        bins=bins(plan.peak, outcome.bins if outcome else (), phases),
        timeline=thin(samples, MOST_SAMPLES),
        phases=phase_peaks(phases, watch.entered_s, run.ended_s),
        tensors=tensors(run.planner, plan),
        what_if=what_if(run.planner, asked.work, plan, asked.cap_bytes),
        growth=checked,
        comparisons=(this, *ways),
        step_s=step_s,
        measuring=_measuring(watch, steps),
        killed=run.killed is not None,
        notes=tuple(note[:1000] for note in run.notes),
    )


def _sampled_peaks(watch: Observer) -> dict[str, int]:
    """The largest sample of each phase: all that is known of a worker that was killed."""
    peaks: dict[str, int] = {}
    for sample in watch.samples:
        peaks[sample.phase] = max(peaks.get(sample.phase, 0), sample.resident_bytes)
    return peaks


def _charged(run: Run) -> int | None:
    """The kernel's largest charge; a control group that killed had been charged its whole cap."""
    if run.outcome is not None:
        return run.outcome.memory.cgroup_peak_bytes
    return run.asked.cap_bytes if run.judge in {"cgroup_v1", "cgroup_v2"} else None


def _measuring(watch: Observer, steps: int) -> Measuring:
    inside = (
        f" The worker looks at itself as briefly after each of {steps} steps, and at all its mappings in the first "
        "step, which is not timed."
    )
    return Measuring(
        samples=watch.looks,
        seconds=watch.looks * watch.look_s,
        note=f"One look at the worker from outside takes {duration(watch.look_s)}.{inside if steps else ''}",
    )


def _against(
    old: Profile | None, new: Profile, tolerance: float
) -> tuple[Difference | None, ConfigError | None]:
    """The comparison with an earlier report, or why there is none: what was measured is written all the same."""
    if old is None:
        return None, None
    try:
        return compare(old, new, tolerance), None
    except ConfigError as error:
        return None, error


def _write(profile: Profile, difference: Difference | None, output: Path) -> tuple[str, tuple[Path, ...]]:
    """Write page, document and text, each as a whole, once all of them can be made."""
    text = render_text(profile, difference)
    contents = {
        ".html": render_page(profile, difference).encode(),
        ".json": encode_profile(profile),
        ".txt": text.encode(),
    }
    paths = tuple(output.with_name(output.name + ending) for ending in contents)
    for path, content in zip(paths, contents.values(), strict=True):
        write_durably(path, content)
    return text, paths


def _broken_budget(profile: Profile) -> BudgetError | None:
    if profile.verdict == "PASS":
        return None
    return BudgetError(f"the run did not keep to its budget: {' '.join(failure_lines(profile))}")


def _regression(difference: Difference | None) -> RegressionError | None:
    if difference is None or not difference.regressed:
        return None
    return RegressionError(difference_line(difference))
