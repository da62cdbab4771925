"""One arm from its first round to its last: :func:`simulate`, readable top to bottom.

The coordinator's own functions do all that a coordinator does; this module moves the clock and the devices. What each
device works on is read back from the database, so a simulation that was killed goes on where it stood.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.auth import Device
from coordinator.refusals import RefusalError, UnusableError
from coordinator.rounds import evaluation, results, tasks
from coordinator.rounds.early_stop import best_of
from coordinator.rounds.runs import find_run
from coordinator.rounds.state_machine import play
from coordinator.simulation.arm import Arm
from coordinator.simulation.fleet import SimulatedDevice, tick, tick_after, tick_from
from coordinator.simulation.trainers import Pending, Trainer
from coordinator.simulation.verdict import RESULT_REFUSED, Ending, judge_evaluation, judge_run, stop
from coordinator.simulation.workbench import Job, Workbench
from coordinator.storage import device_rows, evaluation_rows, round_rows, run_rows, simulation_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.simulation_rows import HeldSlot
from edge_runtime import __version__ as runtime_version
from edge_runtime.agent.decisions import open_task
from edge_runtime.errors import DeviceError
from edge_runtime.protocol.messages import (
    CheckInRequest,
    DeviceEvent,
    MemoryReport,
    NotEligible,
    Result,
    SignedTask,
    Task,
    decode_result,
    encode,
)

#: Twice the virtual seconds between two check-ins of a device that waits, where the run does not say.
SEEN_WINDOW_S = 600.0
#: Called after each pass of the coordinator in which something happened.
Report = Callable[[Arm], None]


@dataclass
class AssignmentInFlight:
    """A task that a device works on.

    Attributes:
        task: task that the device was handed out.
        until_s: moment when the device is done with it.
        answers: whether the device then hands in a result.
        pending: function that waits for the encoded result; None if the result would come too late.
    """

    task: Task
    until_s: float
    answers: bool
    pending: Pending | None = None


class Simulation:
    """An arm with its clock and the assignments that its devices work on.

    Args:
        arm: arm to simulate.
        bench: bench that makes the evaluations.
        trainer: trainer that does the devices' tasks.
        cap_bytes: memory that a device grants, of which some grant half.
    """

    def __init__(self, arm: Arm, bench: Workbench, trainer: Trainer, cap_bytes: int) -> None:
        self.arm, self.stores = arm, arm.stores
        self._bench, self._trainer, self._cap_bytes = bench, trainer, cap_bytes
        #: Between two check-ins of a device that waits.
        self._period_s = tick_after((arm.run.seen_window_s or SEEN_WINDOW_S) / 2)
        self.now_s = self._clock()
        self.in_flight: dict[str, AssignmentInFlight] = self._unfinished()
        self._refusal = "none checked in"
        self._values: set[str] = set()

    def simulate(self, report: Report) -> Ending:
        """Play the arm to its end.

        Args:
            report: function that is called after each pass in which something happened.

        Raises:
            EdgeError: it cannot go on, for a reason that is no property of its learning.
        """
        while True:
            # 1. Devices that are done hand in their results, and ask for more.
            for name in self._done():
                self._hand_in(name, self.in_flight.pop(name))
            # 2. Devices that hold a slot learn of it.
            for name in self._polling():
                self._check_in(name)
            # 3. From time to time every device that waits says that it is still there.
            if self.now_s % self._period_s == 0:
                self._check_in_all()
            # 4. The coordinator does whatever it can do now, and evaluations that it asks for are made at once.
            ending = self._settle()
            report(self.arm)
            # 5. The run has ended, or its values have run away.
            if ending is not None:
                return ending
            # 6. Nothing happens until the next event: the clock jumps there.
            self._jump(self._next_event())

    def _done(self) -> list[str]:
        """Devices whose assignment ends now, by name."""
        return sorted(name for name, at in self.in_flight.items() if at.until_s <= self.now_s)

    def _settle(self) -> Ending | None:
        seen = None
        while (standing := self._standing()) != seen:
            seen = standing
            play(self.stores, self.now_s)
            if (ending := self._evaluate()) is not None:
                return ending
            self._forget_values()
        return judge_run(self.arm, self.now_s)

    def _standing(self) -> tuple[object, ...]:
        """What another pass of the coordinator may have moved."""
        with self.stores.storage.reading() as connection:
            run = run_rows.get(connection, self.arm.run_id)
            open_tasks = simulation_rows.count_open_tasks(connection)
        return (
            run.state,
            run.phase,
            run.next_round,
            run.rounds_done,
            run.abandoned_in_a_row,
            open_tasks,
        )

    def _evaluate(self) -> Ending | None:
        """Make the evaluations that wait."""
        while (waiting := evaluation.next_evaluation(self.stores)) is not None:
            job = waiting.job
            outcome = self._bench.evaluate(job, self._state_of(job.state_path))
            ending = judge_evaluation(self.arm, waiting.round, outcome)
            if not math.isfinite(outcome.mean_loss):
                return stop(self.arm, ending, self.now_s)
            with self.stores.storage.transaction() as connection:
                evaluation.store_evaluation(connection, waiting, outcome, now_s=self.now_s)
            self.arm.note_wall(waiting.round)
            if ending is not None:
                return stop(self.arm, ending, self.now_s)
        return None

    def _next_event(self) -> float:
        """The first moment after the present one, or the present one itself, at which something is due.

        Raises:
            DeviceError: no device can take part, so nothing ever would be.
        """
        with self.stores.storage.reading() as connection:
            slots = simulation_rows.held_slots(connection)
            open_round = round_rows.find_open(connection, self.arm.run_id)
        if not slots and not self.in_flight:
            raise DeviceError(f"no device can take part in a round: {self._refusal}")
        moments = [(self.now_s // self._period_s + 1) * self._period_s]
        moments += [assignment.until_s for assignment in self.in_flight.values()]
        moments += [tick_after(slot.due_s) for slot in slots]
        moments += [self._poll_s(slot) for slot in slots if slot.state == "reserved"]
        if open_round is not None and open_round.state != "aggregating":
            deadline_s = tick_from(open_round.deadline_s)
            if deadline_s > self.now_s:
                moments.append(deadline_s)
        return max(self.now_s, min(moments))

    def _polling(self) -> list[str]:
        """Devices that hold a slot and whose time to ask has come, in the order of their slots."""
        with self.stores.storage.reading() as connection:
            slots = simulation_rows.held_slots(connection)
        return [
            slot.device_name
            for slot in slots
            if slot.state == "reserved"
            and slot.device_name not in self.in_flight
            and self._poll_s(slot) <= self.now_s
        ]

    def _poll_s(self, slot: HeldSlot) -> float:
        """When the device that holds a slot next asks: not before it is done with what it works on."""
        assignment = self.in_flight.get(slot.device_name)
        if assignment is not None and assignment.until_s >= slot.reserved_s:
            return assignment.until_s
        run = self.arm.run
        return slot.reserved_s + self.arm.fleet.poll_delay_s(slot.task_id, run.poll_min_s, run.poll_max_s)

    def _check_in(self, name: str) -> None:
        with self.stores.storage.transaction() as connection:
            self._ask(connection, self.arm.devices[name])

    def _cap_of(self, device: SimulatedDevice) -> int:
        return int(self._cap_bytes * device.cap_share)

    def _check_in_all(self) -> None:
        """One transaction for all that wait: nobody can tell the difference."""
        with self.stores.storage.transaction() as connection:
            expected = {slot.device_name for slot in simulation_rows.held_slots(connection)}
            for name, device in self.arm.devices.items():
                if name not in self.in_flight and name not in expected:
                    self._ask(connection, device)

    def _ask(self, connection: Connection, device: Device) -> None:
        """Check a device in; if it gets a task, it sets to work."""
        simulated = self.arm.fleet.devices[device.name]
        request = CheckInRequest(
            runtime_version, self._cap_of(simulated), 0, len(simulated.rows), protects=True
        )
        answer = tasks.check_in(self.stores, connection, device, request, now_s=self.now_s)
        if isinstance(answer, NotEligible):
            self._refusal = answer.message
        if not isinstance(answer, SignedTask):
            # A device that waits says so once in a period, though its fellows in the field would more often.
            device_rows.expect(connection, device.device_id, self.now_s + 2 * self._period_s)
            return
        task = open_task(answer, self.stores.key.public_key)
        blobs = self._blobs_of(task)
        down_bytes = len(encode(answer)) + sum(map(len, blobs))
        round_rows.add_bytes(connection, up_bytes=len(encode(request)), down_bytes=down_bytes)
        self.in_flight[device.name] = self._assignment(task, simulated, self.now_s, blobs)

    def _blobs_of(self, task: Task) -> tuple[bytes, bytes]:
        """What a device fetches for a task beside the package: the values, and what directions are compared with.

        The second is empty if the task names none.
        """
        return self.stores.blobs.get(task.state), (
            b"" if task.reference is None else self.stores.blobs.get(task.reference)
        )

    def _assignment(
        self, task: Task, device: SimulatedDevice, since_s: float, blobs: tuple[bytes, bytes] | None
    ) -> AssignmentInFlight:
        """What a device does with a task; training begins if the result will be in time.

        Args:
            task: task that the device was handed out.
            device: device that works on it.
            since_s: moment when the device got it.
            blobs: values and reference that the device fetched; None if the coordinator has taken the task back.
        """
        manifest = self.arm.stores.manifest(task.package)
        seconds = self.arm.fleet.duration_s(task, manifest, device)
        deadline_s = since_s + task.deadline_s
        # A device that gives no result in time is heard of again once the coordinator has given its slot away.
        given_up_s = tick_after(tick_after(deadline_s))
        if self.arm.fleet.drops(task.task_id):
            return AssignmentInFlight(task, given_up_s, answers=False)
        if since_s + seconds > deadline_s:
            return AssignmentInFlight(task, max(since_s + seconds, given_up_s), answers=True)
        assignment = AssignmentInFlight(task, since_s + seconds, answers=True)
        if blobs is not None:
            state, reference = blobs
            job = Job(task, device.rows, state, self._cap_of(device), seconds, reference, device.adjoints)
            assignment.pending = self._trainer.submit(job)
        return assignment

    def _hand_in(self, name: str, assignment: AssignmentInFlight) -> None:
        """The result reaches the coordinator, which may refuse it; then the device asks for work."""
        device, task = self.arm.devices[name], assignment.task
        body = b""
        if assignment.answers and assignment.pending is not None and self._is_open(task.task_id):
            body = assignment.pending()
        result = decode_result(body) if body else _too_late(task)
        with self.stores.storage.transaction() as connection:
            if assignment.answers:
                try:
                    receipt = results.accept(
                        self.stores, connection, device, task.task_id, result, now_s=self.now_s
                    )
                    down_bytes = len(encode(receipt))
                    round_rows.add_bytes(connection, up_bytes=len(body), down_bytes=down_bytes)
                except RefusalError as refusal:  # as a device does: the coordinator has decided
                    round_rows.add_bytes(connection, up_bytes=len(body), down_bytes=0)
                    if isinstance(refusal, UnusableError):
                        event = DeviceEvent(RESULT_REFUSED, refusal.message, task.task_id)
                        tasks.report_event(connection, device, event, now_s=self.now_s)
            self._ask(connection, device)

    def _is_open(self, task_id: str) -> bool:
        with self.stores.storage.reading() as connection:
            task = task_rows.find(connection, task_id)
        return task is not None and task.state == "working"

    def _state_of(self, path: str) -> bytes:
        return self.stores.blobs.get(path.rpartition("/")[2])

    def _forget_values(self) -> None:
        """Remove the values of rounds that are over; hundreds of rounds would fill the disk."""
        with self.stores.storage.reading() as connection:
            run = find_run(self.stores, connection, self.arm.run_id)
            scores = best_of(evaluation_rows.done(connection, run.run_id), run.manifest.task == "causal_lm")
            best = "" if scores is None else evaluation_rows.values_of(connection, run.run_id, scores.round)
            # Devices of a buffered run may still work on values of earlier rounds.
            oldest = run.committed - (run.config.max_staleness + 1 if run.is_buffered else 0)
            in_use = simulation_rows.states_in_use(connection, since=oldest)
        initial = run.manifest.files[run.manifest.initial_state].sha256
        # Training that stops goes back to its best values.
        kept = {run.values_sha256, best, *in_use} - {"", initial}
        for sha256 in self._values - kept:
            self.stores.blobs.discard(sha256)
        self._values = kept

    def _clock(self) -> float:
        """The moment at which the simulation stands, in virtual seconds since it began."""
        with self.stores.storage.transaction() as connection:
            return simulation_rows.begin_clock(connection)

    def _jump(self, now_s: float) -> None:
        """Move the clock; what is done at a moment can be done again, so one that was cut short is repeated."""
        with self.stores.storage.transaction() as connection:
            simulation_rows.set_clock(connection, now_s)
        self.now_s = now_s

    def _unfinished(self) -> dict[str, AssignmentInFlight]:
        """The assignments of all devices that a process which was killed left behind."""
        with self.stores.storage.reading() as connection:
            rows = simulation_rows.tasks_without_result(connection)
        in_flight = {}
        for row in rows:
            task = row.read_task()
            device = self.arm.fleet.devices[row.device_name]
            since_s = tick(row.due_s - task.deadline_s)
            blobs = self._blobs_of(task) if row.state == "working" else None
            assignment = self._assignment(task, device, since_s, blobs)
            if row.state == "working" or assignment.until_s >= self.now_s:
                in_flight[row.device_name] = assignment
        return in_flight


def _too_late(task: Task) -> Result:
    """A stand-in for a result that comes too late: the coordinator refuses it before looking into it."""
    return Result(
        task.task_id,
        task.run_id,
        task.round,
        0,
        0,
        0,
        None,
        0.0,
        MemoryReport(0, 0, 0),
        hashlib.sha256(b"").hexdigest(),
        b"",
    )
