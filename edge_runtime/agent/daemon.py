"""The device's daemon: it asks for work, has a worker do it, and hands the result in.

One turn reads top to bottom in :meth:`Agent._turn`. What to do is decided in :mod:`edge_runtime.agent.decisions`; this
module moves bytes and processes. It loads neither numpy nor an engine, because it must stay small while it waits, which
is nearly always.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from edge_runtime import __version__
from edge_runtime.agent import decisions, uploads
from edge_runtime.agent.client import Client
from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.downloads import Downloads
from edge_runtime.agent.eligibility import ABOUT_TRAINING, Gate
from edge_runtime.agent.host import Host
from edge_runtime.agent.masked_round import MaskedRound
from edge_runtime.agent.own_rows import count_own_rows
from edge_runtime.agent.release import take_release
from edge_runtime.agent.service_manager import ServiceManager
from edge_runtime.agent.setup import setup_of
from edge_runtime.agent.sign_of_life import SignOfLife
from edge_runtime.agent.store import IDENTITY, Identity, Store
from edge_runtime.agent.watch import ConditionsWatch
from edge_runtime.engines.choice import engine_version
from edge_runtime.errors import (
    CapExceededError,
    CoordinatorError,
    DeviceError,
    EdgeError,
    OutOfMemoryError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from edge_runtime.log import note, warn
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import is_current
from edge_runtime.protocol.messages import (
    MAX_RESULT_BYTES,
    CheckInRequest,
    DeviceEvent,
    NotEligible,
    Refusal,
    SignedRelease,
    SignedTask,
    Task,
    decode_result,
)
from edge_runtime.training.methods import measures_line
from edge_runtime.worker.jobs import HandedIn, Job, PrepareJob, PrepareOutcome, TrainJob, TrainOutcome
from edge_runtime.worker.process import RunningWorker, finish_worker, start_worker

#: How often rows are counted that only a worker can count.
RECOUNT_EVERY_S = 3600.0


class Agent:
    """One device's daemon.

    Args:
        config: the device's configuration.
        store: the device's state folder.
        client: signed calls to the coordinator.
        identity: the device's id, and the key that must have signed its tasks.
        launch: function that starts a worker; None starts one that the service manager hears of.
        sleep: function through which all waiting goes, in seconds.
        source: source of all random choices; None takes the system's.
        gate: what decides whether the device may work; None asks this machine.
        service_manager: what is told that the agent serves and lives; None takes that of this process.
    """

    def __init__(
        self,
        config: DeviceConfig,
        store: Store,
        client: Client,
        identity: Identity,
        *,
        launch: Callable[[Job], RunningWorker] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        source: random.Random | None = None,
        gate: Gate | None = None,
        service_manager: ServiceManager | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._client = client
        self._identity = identity
        self._masked_round = MaskedRound(store.folder)
        self._sleep = sleep
        self._service_manager = service_manager or ServiceManager()
        self._launch = launch or partial(start_worker, on_look=self._service_manager.alive)
        self._downloads = Downloads(config, store, client, sleep)
        self._pace = decisions.Pace(source or random.SystemRandom())
        self._engine = engine_version(config.engine)
        self._gate = gate or Gate(config.eligibility, Conditions(Host(), config.state_folder))
        self._floor_bytes = 0
        #: Memory that a task takes: the cap, until a plan said.
        self._needed_bytes = config.cap
        self._counted: tuple[tuple[str, int], int] | None = None
        self._worker: RunningWorker | None = None
        #: Memory that plans may use: the cap, until a worker met it.
        self._budget_bytes = config.cap

    def run(self) -> None:
        """Take turns until SIGTERM or SIGINT, then stop the worker and return.

        A pending result is kept, and so is how far a task has come: after the next start it goes on from there.

        Raises:
            RefusedError: the device was revoked, so that asking again helps nobody; says how to come back.
        """
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        note("started", device_id=self._identity.device_id, version=__version__, cap_bytes=self._config.cap)
        self._service_manager.ready()
        try:
            while True:
                self._service_manager.wait(self.turn(), self._sleep)
        except KeyboardInterrupt:
            self._service_manager.stopping()
            note("stopped", pending=self._store.pending() is not None)
        except RefusedError as error:
            raise RefusedError(
                f"{error}; to let this device back in, remove {self._store.folder / IDENTITY}, give it a new token "
                "and start it",
                code=error.code,
            ) from error
        finally:
            signal.signal(signal.SIGTERM, before)

    def turn(self) -> float:
        """Take one turn, and return the seconds to wait after it. Whatever goes wrong is logged and becomes a wait.

        Raises:
            RefusedError: the device was revoked; a pending result is kept.
        """
        try:
            wait_s = self._turn()
        except UnreachableError as error:
            wait_s = self._pace.failed(error.retry_after_s)
            warn("unreachable", error=error, wait_s=wait_s)
        except CoordinatorError as error:
            if _is_final(error):
                raise
            passing = isinstance(error, RefusedError) and error.code in decisions.PASSING_REFUSALS
            wait_s = self._pace.failed() if passing else self._pace.refused()
            warn("turned_away", error=error, wait_s=wait_s)
        except (DeviceError, OSError) as error:
            wait_s = self._pace.failed()
            self._tell(decisions.describe("device_failed", error, None))
        return wait_s

    def _turn(self) -> float:
        self._deliver_pending()
        if (again_s := self._masked_round.go_on(self._client)) is not None:
            return again_s
        setup = setup_of(self._config, self._engine)
        rows = self._example_count(setup)
        reason = self._gate.reason(rows=rows, needed_bytes=self._needed_bytes)
        answer = self._client.check_in(
            CheckInRequest(
                runtime_version=__version__,
                cap_bytes=self._config.cap,
                floor_bytes=self._floor_bytes,
                example_count=rows,
                setup=setup,
                trains=self._config.train,
                release=self._store.releases.state().decided_with(setup),
                not_eligible=reason or "",
                protects=True,
            )
        )
        if not isinstance(answer, SignedTask):
            if answer.release is not None and (reason is None or reason in ABOUT_TRAINING):
                self._take_release(answer.release, setup)
            wait_s = self._pace.asked(answer.after_min_s, answer.after_max_s)
            if isinstance(answer, NotEligible):
                warn("not_eligible", code=answer.code, message=answer.message, wait_s=wait_s)
            else:
                note("waiting", reason=answer.reason, wait_s=wait_s)
            return wait_s
        received_s = time.monotonic()
        try:
            task = decisions.open_task(answer, self._identity.coordinator_public_key)
        except EdgeError as error:
            self._tell(decisions.describe("task_untrusted", error, None))
            return self._pace.failed()
        note("task_received", task_id=task.task_id, round=task.round, required_bytes=task.required_bytes)
        with SignOfLife(partial(self._client.say_alive, task.task_id), self._stop_worker) as sign_of_life:
            if not self._complete_task(task, sign_of_life, received_s=received_s):
                return self._pace.failed()
            self._deliver_pending()
        return self._pace.done()

    def _example_count(self, setup: str) -> int:
        """Number of rows that the device trains on.

        What a function of the operator's own gives is counted again where the setup has changed, and once an hour.
        """
        if not self._config.train:
            return 0
        if self._config.data_function is None:
            return count_own_rows(self._config, "train", self._store.split_key())
        as_of = (setup, int(time.monotonic() / RECOUNT_EVERY_S))
        if self._counted is None or self._counted[0] != as_of:
            rows = count_own_rows(self._config, "train", self._store.split_key(), self._start_worker)
            self._counted = (as_of, rows)
        return self._counted[1]

    def _take_release(self, signed: SignedRelease, setup: str) -> None:
        """Decide about a release, and tell the coordinator what came of it."""
        event = take_release(
            signed,
            coordinator_key=self._identity.coordinator_public_key,
            setup=setup,
            config=self._config,
            store=self._store,
            downloads=self._downloads,
            launch=self._launch,
        )
        if event is not None:
            self._tell(event)

    def _complete_task(self, task: Task, sign_of_life: SignOfLife, *, received_s: float) -> bool:
        """Do a whole task, and keep its result as pending.

        Returns:
            Whether there is a result; if not, the coordinator has been told why, or will be by the next check-in.
        """
        conditions: ConditionsWatch | None = None
        try:
            decisions.admit_task(task, self._config)
            deadline_s = received_s + task.deadline_s
            package, state, reference = self._fetch_all(task)
            with ConditionsWatch(self._gate, self._tell_worker_to_stop) as conditions:
                prepared = self._prepare(task, package, deadline_s)
                result = self._training_result(task, package, prepared, state, reference, deadline_s)
            self._store.keep_pending(result)
            self._store.drop_progress()
        except UnreachableError:
            raise
        except CapExceededError as error:
            self._tell(decisions.describe("task_refused", error, task.task_id))
            return False
        except (EdgeError, OSError) as error:
            if sign_of_life.unwanted or (conditions is not None and conditions.reason is not None):
                return False  # nobody waits to hear why, or the next check-in tells
            self._store.drop_progress()
            code = "out_of_memory" if isinstance(error, OutOfMemoryError) else "task_failed"
            self._tell(decisions.describe(code, error, task.task_id))
            return False
        return True

    def _start_worker(self, job: Job) -> RunningWorker:
        """A worker on a job; until it has ended :meth:`_stop_worker` stops it."""
        self._worker = self._launch(job)
        return self._worker

    def _stop_worker(self) -> None:
        """Stop the worker that runs, if one does; may be called from any thread."""
        if self._worker is not None:
            self._worker.kill()

    def _tell_worker_to_stop(self) -> None:
        """Have the worker stop after its present step, if one runs; may be called from any thread."""
        if self._worker is not None:
            self._worker.tell_to_stop()

    def _fetch_all(self, task: Task) -> tuple[Package, Path, Path | None]:
        """Download what the task needs and is not here yet, and lay the package out.

        Returns:
            The package; the file of the task's values; and the file of its reference, None if it has none.
        """
        compared = task.reference if task.directions == "filtered" or measures_line(task) else None
        package, (state, *rest), fetched_bytes = self._downloads.package(
            task.package,
            task.package_signature,
            (task.state, *([compared] if compared else [])),
            lambda manifest: decisions.admit_package(task, manifest, self._config),
        )
        note("fetched", task_id=task.task_id, package=task.package, fetched_bytes=fetched_bytes)
        return package, state, rest[0] if rest else None

    def _prepare(self, task: Task, package: Package, deadline_s: float) -> Path:
        """Folder of the package as prepared for this machine.

        A worker prepares it, unless that was done before and still holds.
        """
        folder = self._store.prepared_folder(task.package)
        if is_current(folder, task.package, self._config.arithmetic, self._config.engine):
            return folder
        _require_time(task, deadline_s)
        remaining_s = deadline_s - time.monotonic()
        job = PrepareJob(
            package_folder=str(package.folder),
            package_sha256=task.package,
            prepared_folder=str(folder),
            cap_bytes=self._config.cap,
            threads=self._config.engine_threads,
            arithmetic=self._config.arithmetic,
            engine=self._config.engine,
        )
        outcome = finish_worker(self._start_worker(job), PrepareOutcome, remaining_s)
        note("prepared", package=task.package, arithmetic=outcome.arithmetic, seconds=outcome.seconds)
        return folder

    def _training_result(
        self,
        task: Task,
        package: Package,
        prepared: Path,
        state: Path,
        reference: Path | None,
        deadline_s: float,
    ) -> bytes:
        """Have a worker train, and encode the result to hand in."""
        _require_time(task, deadline_s)
        sums, handed_in = self._store.sums, None
        if task.handed_in:
            record = sums.record_path(task.handed_in)
            handed_in = HandedIn(str(record), sum(sums.sizes(task.handed_in)))
        work = self._store.new_work_folder()
        change, rows = work / "change.safetensors", work / "rows"
        job = TrainJob(
            package_folder=str(package.folder),
            package_sha256=task.package,
            prepared_folder=str(prepared),
            state_path=str(state),
            data_path=str(self._config.training_data),
            delta_path=str(change),
            task=task,
            cap_bytes=self._config.cap,
            threads=self._config.engine_threads,
            budget_bytes=self._budget_bytes,
            prefix_cache_bytes=self._config.prefix_cache,
            engine=self._config.engine,
            reference_path=str(reference) if reference else "",
            reading=self._config.reading("train", self._store.split_key()),
            progress_path=str(self._store.progress_path),
            handed_in=handed_in,
            rows_path=str(rows) if task.head == "closed_form" else "",
            row_key=self._store.split_key().hex() if task.head == "closed_form" else "",
        )
        note("training", task_id=task.task_id, slices=len(task.slices), steps=task.steps)
        outcome = self._run_with_one_retry(job, deadline_s)
        self._floor_bytes = outcome.memory.floor_bytes
        self._needed_bytes = outcome.plan.peak.total_bytes
        note(
            "trained",
            task_id=task.task_id,
            seconds=outcome.seconds,
            steps_applied=outcome.steps_applied,
            steps_skipped=outcome.steps_skipped,
            peak_bytes=outcome.memory.high_water_bytes,
            **({"estimator": outcome.plan.reason} if outcome.plan.reason else {}),
            enforced_by=outcome.memory.enforced_by,
        )
        data, kept = _read_change(change), task.handed_in if outcome.stands else ()
        removed = () if outcome.stands else sums.read(task.handed_in)
        if task.head == "closed_form" and not (task.masked or task.noised):
            sums.keep(kept, data, rows.read_bytes(), task.handed_in)
        if task.masked:
            keys = self._masked_round.begin(task, self._store.key(), data)
            return decisions.build_result(task, outcome, b"", masking=keys)
        return decisions.build_result(task, outcome, data, kept=kept, removed=removed)

    def _run_with_one_retry(self, job: TrainJob, deadline_s: float) -> TrainOutcome:
        """Run a training job in a worker.

        If that meets the cap and enough time is left, run it once more with a smaller plan.

        The lower budget is kept for later tasks. It is not kept where no plan fits it: then the cap is too small, and
        saying so is better than refusing every task from then on.
        """
        started_s = time.monotonic()
        try:
            return finish_worker(self._start_worker(job), TrainOutcome, deadline_s - started_s)
        except OutOfMemoryError as error:
            now_s = time.monotonic()
            if deadline_s - now_s <= now_s - started_s:
                raise
            smaller = msgspec.structs.replace(job, budget_bytes=decisions.smaller_budget(job.budget_bytes))
            self._tell(decisions.describe_retry(error, smaller.budget_bytes, job.task.task_id))
            try:
                outcome = finish_worker(self._start_worker(smaller), TrainOutcome, deadline_s - now_s)
            except CapExceededError:
                raise error from None
            except OutOfMemoryError:
                self._budget_bytes = smaller.budget_bytes
                raise
            self._budget_bytes = smaller.budget_bytes
            return outcome

    def _deliver_pending(self) -> None:
        """Hand in the result that waits, and forget it once the coordinator has decided about it."""
        body = self._store.pending()
        if body is None:
            return
        try:
            task_id = decode_result(body).task_id
        except ProtocolError as error:
            warn("result_unreadable", path=self._store.set_pending_aside(), error=error)
            return
        answer = uploads.deliver(self._client, task_id, body, self._sleep)
        self._store.drop_pending()
        if isinstance(answer, Refusal):
            warn("result_refused", task_id=task_id, code=answer.code, message=answer.message)
        else:
            note("result_delivered", task_id=task_id, status=answer.status)

    def _tell(self, event: DeviceEvent) -> None:
        """Log an event and send it. The turn goes on if it does not arrive, since the log has it.

        Raises:
            RefusedError: the device was revoked.
        """
        warn(event.code, task_id=event.task_id, message=event.message)
        try:
            self._client.send_event(event)
        except CoordinatorError as error:
            if _is_final(error):
                raise
            warn("event_not_sent", error=error)


def _is_final(error: CoordinatorError) -> bool:
    """Whether the coordinator refused this device for good."""
    return isinstance(error, RefusedError) and error.code in decisions.FINAL_REFUSALS


def _require_time(task: Task, deadline_s: float) -> None:
    """Refuse to start a worker whose result would come too late.

    Raises:
        DeviceError: the deadline has passed.
    """
    if time.monotonic() >= deadline_s:
        raise DeviceError(f"the deadline of {task.deadline_s:.0f} s passed before training could start")


def _read_change(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_RESULT_BYTES:
        raise DeviceError(
            f"the change has {size} bytes, over the limit of {MAX_RESULT_BYTES}; assign fewer slices"
        )
    return path.read_bytes()
