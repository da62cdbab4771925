import errno
import hashlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent import watch
from edge_runtime.agent.client import Client
from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.decisions import FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S, REFUSED_WAIT_S, Pace
from edge_runtime.agent.eligibility import Eligibility, Gate
from edge_runtime.agent.enrolment import ensure_identity
from edge_runtime.agent.host import Host
from edge_runtime.agent.service_manager import ServiceManager
from edge_runtime.agent.store import Store
from edge_runtime.agent.transport import Response
from edge_runtime.errors import ConfigError, RefusedError, SignatureError
from edge_runtime.figures import size
from edge_runtime.log import _line
from edge_runtime.memory.plan import ExecutionChoice, PeakPrediction, Work
from edge_runtime.package.prepared import PREPARED
from edge_runtime.protocol.messages import ComeBack, LocalOptimizer, NotEligible, SignedTask, Task, encode
from edge_runtime.protocol.signing import PrivateKey, generate_key
from edge_runtime.worker.jobs import Job, PrepareJob, TrainJob
from edge_runtime.worker.process import RunningWorker, start_worker
from tests.edge_runtime.packages import FILES, make_manifest, write_prepared
from tests.edge_runtime.simulator import DEVICE_ID, TOKEN, CoordinatorSimulator, refusal

PUBLISHER = generate_key()
#: Enough for an interpreter and its cap's enforcement by the kernel.
CAP_BYTES = 64 << 20

#: Stands in for the worker: obeys the contract of edge_runtime.worker.jobs without training anything.
GOOD_WORKER = """
import json, sys
job = json.load(sys.stdin)
assert open(job["package_folder"] + "/weights/block.bin", "rb").read() == bytes(64)
assert open(job["state_path"], "rb").read() == b"state"
open(job["delta_path"], "wb").write(b"the change")
print(json.dumps({
    "examples": 8, "steps_applied": 2, "steps_skipped": 0, "mean_loss": 0.5, "seconds": 0.1,
    "memory": {
        "predicted_peak_bytes": 5, "high_water_bytes": 4, "cap_bytes": job["cap_bytes"], "floor_bytes": 3
    },
    "plan": {
        "work": %(work)s, "choice": %(choice)s, "peak": %(peak)s, "step_s": None
    },
}))
""" % {
    name: repr(msgspec.to_builtins(value))
    for name, value in {
        "work": Work(4, 16, 1, ("block0.query",)),
        "choice": ExecutionChoice("resident", 1, 1),
        "peak": PeakPrediction(0, 0, 0, 0, 0, 0, 0, 0),
    }.items()
}
#: Answers that the package is prepared; :meth:`Board.start` has prepared it.
PREPARING_WORKER = """
import json, sys
job = json.load(sys.stdin)
print(json.dumps({
    "arithmetic": "float", "candidates": [], "seconds": 0.1,
    "memory": {"predicted_peak_bytes": 0, "high_water_bytes": 4, "cap_bytes": job["cap_bytes"]},
}))
"""
CAP_WORKER = """
import json, sys
sys.stdin.read()
print(json.dumps({"kind": "CapExceededError", "message": "9 over 5", "required_bytes": 9, "cap_bytes": 5}))
sys.exit(3)
"""
KILLED_WORKER = "import os, sys; sys.stdin.read(); os.kill(os.getpid(), 9)"
NONSENSE_WORKER = "import sys; sys.stdin.read(); print('nonsense')"
#: Takes more than the cap while its plan is for more than four fifths of it, and says which phase it is in.
GREEDY_WORKER = """
import json, sys
job = json.load(sys.stdin)
print('{"type":"phase","phase":"step"}', flush=True)
if job["budget_bytes"] > 0.8 * job["cap_bytes"]:
    try:
        block = bytearray(b"x") * (16 * job["cap_bytes"])
    except MemoryError:
        print('{"kind": "OutOfMemoryError", "message": "MemoryError"}')
        sys.exit(3)
open(job["delta_path"], "wb").write(b"the change")
""" + GOOD_WORKER[GOOD_WORKER.index("print(") :]
ALWAYS_GREEDY_WORKER = GREEDY_WORKER.replace("0.8 *", "0 *")
#: Has no plan for less than the cap.
STUBBORN_WORKER = GREEDY_WORKER.replace(
    "open(job[",
    """if job["budget_bytes"] < job["cap_bytes"]:
    print('{"kind": "CapExceededError", "message": "no plan"}')
    sys.exit(3)
open(job[""",
    1,
)
#: Meets the cap only after half of the task's time.
LATE_WORKER = GREEDY_WORKER.replace("import json, sys", "import json, sys, time; time.sleep(1.2)")
SLOW_WORKER = "import sys, time; sys.stdin.read(); time.sleep(60)"
#: Asks its parent to stop, as an operator would in mid-training.
INTERRUPTED_WORKER = "import os, sys, time; sys.stdin.read(); os.kill(os.getppid(), 15); time.sleep(60)"


class Board:
    """A device before a simulated coordinator: one call of :meth:`start` is one start of the agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coordinator = CoordinatorSimulator()
        self.slept: list[float] = []
        self.workers: list[RunningWorker] = []
        self.jobs: list[TrainJob] = []
        self.preparations: list[PrepareJob] = []
        (folder / "data.jsonl").write_text('{"text": "fine", "label": "positive"}\n' * 3)
        self.config = DeviceConfig(
            coordinator_url="http://localhost",
            state_folder=folder / "state",
            data=folder / "data.jsonl",
            device_name="board-1",
            device_class="generic",
            publisher_key=PUBLISHER.public_key,
            cap=CAP_BYTES,
            enrolment_token=TOKEN,
        )
        self.manifest = msgspec.json.encode(make_manifest())

    def start(
        self,
        worker: str = GOOD_WORKER,
        sleep: Callable[[float], None] | None = None,
        gate: Gate | None = None,
        service_manager: ServiceManager | None = None,
    ) -> Agent:
        """The agent as a fresh process would build it."""
        self.store = Store(self.config.state_folder, disk_quota_bytes=self.config.disk_quota)
        identity = ensure_identity(self.config, self.store, self.coordinator)
        client = Client(self.coordinator, self.store.key(), identity.device_id)

        def launch(job: Job) -> RunningWorker:
            if isinstance(job, PrepareJob):
                self.preparations.append(job)
                write_prepared(Path(job.prepared_folder), job.package_sha256)
                return start_worker(job, [sys.executable, "-c", PREPARING_WORKER])
            assert isinstance(job, TrainJob)
            self.jobs.append(job)
            self.workers.append(start_worker(job, [sys.executable, "-c", worker]))
            return self.workers[-1]

        return Agent(
            self.config,
            self.store,
            client,
            identity,
            launch=launch,
            sleep=sleep or self.slept.append,
            source=random.Random(1),
            gate=gate,
            service_manager=service_manager,
        )

    def task(self, publisher: PrivateKey = PUBLISHER, **changes: object) -> Task:
        """A task whose blobs the coordinator offers."""
        for data in FILES.values():
            self.coordinator.add_blob(data)
        task = Task(
            task_id="t-1",
            run_id="r-1",
            round=1,
            slot=0,
            seed=7,
            package=self.coordinator.add_blob(self.manifest),
            package_signature=publisher.sign(self.manifest),
            state=self.coordinator.add_blob(b"state"),
            slices=("block0.query",),
            train_head=True,
            steps=2,
            batch_size=4,
            draws=1,
            sequence_limit=16,
            optimizer=LocalOptimizer(),
            required_bytes=900,
            deadline_s=60.0,
        )
        return msgspec.structs.replace(task, **changes)

    def event(self) -> tuple[str, str]:
        """Code and message of the only event that arrived."""
        (event,) = self.coordinator.events
        return event.code, event.message


@pytest.fixture
def board(tmp_path) -> Board:
    """A device that has not enrolled yet."""
    return Board(tmp_path)


#: Sums up rows, and writes which rows are in its sums beside them.
SUMMING_WORKER = GOOD_WORKER.replace('b"the change"', 'b"%s"').replace(
    'open(job["delta_path"]',
    'open(job["rows_path"], "wb").write(b"0123456789abcdef")\nopen(job["delta_path"]',
)
#: A task of a visit, of a package whose only block the head reads.
VISIT = {"head": "closed_form", "slices": (), "features": (0,)}


def summing(change: bytes, *, stands: bool) -> str:
    """A worker that hands in these bytes."""
    worker = SUMMING_WORKER.replace("%s", change.decode())
    return worker.replace('"examples": 8', f'"stands": {stands}, "examples": 8')


def test_sums_that_stand_no_more_come_back_as_they_were_handed_in(board) -> None:
    """A second visit keeps what stands by its digest; where rows have gone, the very bytes travel to be taken off."""
    board.coordinator.offer(board.task(**VISIT))
    board.start(summing(b"first", stands=True)).turn()
    first = hashlib.sha256(b"first").hexdigest()

    board.coordinator.offer(board.task(**VISIT, task_id="t-2", handed_in=(first,)))
    board.start(summing(b"more", stands=True)).turn()
    added = board.coordinator.results["t-2"]
    assert (added.change, added.kept, added.removed) == (b"more", (first,), ())
    more = added.change_sha256

    board.coordinator.offer(board.task(**VISIT, task_id="t-3", handed_in=(first, more)))
    board.start(summing(b"anew", stands=False)).turn()
    replaced = board.coordinator.results["t-3"]
    assert (replaced.change, replaced.kept, replaced.removed) == (b"anew", (), (b"first", b"more"))
    assert board.jobs[-1].handed_in.bytes == len(b"firstmore")


def test_a_device_that_lost_its_record_says_what_helps(board) -> None:
    """Sums that the device does not know cannot be gone on from: it trains nothing, and tells the way out."""
    board.coordinator.offer(board.task(**VISIT, handed_in=("0" * 64,)))
    board.start().turn()
    code, message = board.event()
    assert code == "task_failed"
    assert "no record of the 1 sums" in message
    assert "a run without continue_from asks all devices anew" in message
    assert not board.jobs


def test_a_task_is_done_and_delivered(board) -> None:
    """From check-in to receipt: the result is counted, holds the change, and nothing stays pending."""
    agent = board.start()
    board.coordinator.offer(board.task())
    assert agent.turn() == 0.0
    result = board.coordinator.results["t-1"]
    assert (result.change, result.examples) == (b"the change", 8)
    assert result.change_sha256 == hashlib.sha256(b"the change").hexdigest()
    assert board.coordinator.receipts == ["counted"]
    assert board.store.pending() is None
    assert board.coordinator.events == []


def test_a_check_in_states_what_the_device_has(board) -> None:
    """The coordinator learns the cap, the number of examples and, once measured, the worker's floor."""
    agent = board.start()
    board.coordinator.offer(board.task())
    agent.turn()
    agent.turn()
    first, second = board.coordinator.check_ins
    assert (first.cap_bytes, first.example_count, first.floor_bytes) == (CAP_BYTES, 3, 0)
    assert second.floor_bytes == 3


def test_a_device_that_may_not_work_says_why(board) -> None:
    """Its check-in has the reason; the next one, when it may work again, has none."""
    board.config = msgspec.structs.replace(board.config, eligibility=Eligibility(least_rows=4))
    agent = board.start()
    agent.turn()
    with (board.folder / "data.jsonl").open("a") as file:
        file.write('{"text": "well", "label": "positive"}\n')
    agent.turn()
    assert [said.not_eligible for said in board.coordinator.check_ins] == ["few_rows", ""]


def test_the_plan_says_how_much_memory_must_be_free(board) -> None:
    """Before the first task it is the cap, afterwards what the task's plan took."""
    machine = board.folder / "machine"
    (machine / "proc").mkdir(parents=True)
    (machine / "proc/meminfo").write_text("MemAvailable: 65535 kB\n")
    settings = Eligibility(needs_free_memory=True)
    gate = Gate(settings, Conditions(Host(machine), board.folder))
    agent = board.start(gate=gate)
    agent.turn()
    board.coordinator.offer(board.task())
    agent.turn()
    agent.turn()
    assert [said.not_eligible for said in board.coordinator.check_ins] == ["little_memory"] * 2 + [""]


@pytest.mark.parametrize("stays_bad", [True, False])
def test_bad_conditions_stop_a_task(board, monkeypatch, stays_bad: bool) -> None:
    """The worker stops without a word of failure; the next check-in says why, or the same task goes on."""
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.05)
    zone = board.folder / "machine/sys/class/thermal/thermal_zone0/temp"
    zone.parent.mkdir(parents=True)
    zone.write_text("50000")
    gate = Gate(Eligibility(highest_celsius=70.0), Conditions(Host(board.folder / "machine"), board.folder))
    agent = board.start(SLOW_WORKER, gate=gate)
    board.coordinator.offer(board.task())
    monkeypatch.setattr(agent, "_training_result", hot_during(agent._training_result, zone))
    agent.turn()
    assert board.coordinator.events == []
    assert board.workers[0].process.poll() is not None
    monkeypatch.undo()
    if not stays_bad:
        zone.write_text("50000")
    board.coordinator.offer(board.task())
    agent._launch = board.start(GOOD_WORKER)._launch
    agent.turn()
    assert board.coordinator.check_ins[-1].not_eligible == ("too_hot" if stays_bad else "")


def hot_during(train: Callable[..., bytes], zone: Path) -> Callable[..., bytes]:
    """Training in whose course it gets too hot."""

    def run(*arguments: object) -> bytes:
        zone.write_text("75000")
        return train(*arguments)

    return run


def test_a_second_task_fetches_only_what_is_new(board) -> None:
    """Blobs are kept: a task on the same package downloads its state and nothing else."""
    agent = board.start()
    board.coordinator.offer(board.task())
    agent.turn()
    board.coordinator.requests.clear()
    board.coordinator.offer(board.task(task_id="t-2"))
    agent.turn()
    assert not [request for request in board.coordinator.requests if "/blobs/" in request.path]
    assert set(board.coordinator.results) == {"t-1", "t-2"}


def test_a_reference_is_fetched_like_the_state(board) -> None:
    """Filtered directions come with a blob to compare with, forward mode with a line: the worker gets its file."""
    agent, sha256 = board.start(), board.coordinator.add_blob(b"the last change")
    asked = {"directions": "filtered", "candidates": 4}
    board.coordinator.offer(board.task(reference=sha256, **asked))
    board.coordinator.offer(board.task(task_id="t-2", **asked))
    board.coordinator.offer(board.task(task_id="t-3", reference=sha256, update="backprop"))
    board.coordinator.offer(board.task(task_id="t-4", reference=sha256))
    for _ in range(4):
        agent.turn()
    first, second, third, fourth = board.jobs
    assert Path(first.reference_path).read_bytes() == b"the last change"
    assert second.reference_path == third.reference_path == ""
    assert fourth.reference_path == first.reference_path
    assert board.coordinator.events == []


def test_a_reference_over_the_limit_costs_the_task(board) -> None:
    """Its download is bounded as that of the state is."""
    board.config = msgspec.structs.replace(board.config, max_blob_bytes=4096)
    agent, sha256 = board.start(), board.coordinator.add_blob(bytes(4097))
    board.coordinator.offer(board.task(directions="filtered", reference=sha256))
    agent.turn()
    code, message = board.event()
    assert (code, message) == ("task_failed", "ProtocolError: the answer is over its limit")


def test_what_does_not_go_together_is_told_before_anything_is_fetched(board) -> None:
    """A task that no device can do is given back once its manifest is here."""
    agent = board.start()
    board.coordinator.offer(board.task(update="zero_order"))
    agent.turn()
    code, message = board.event()
    assert code == "task_failed"
    assert message.startswith("ConfigError")
    assert board.jobs == []


def test_a_package_is_prepared_once(board) -> None:
    """Before the first task on a package a worker prepares it; later tasks find it prepared, after a start too."""
    agent = board.start()
    for task_id in ("t-1", "t-2"):
        board.coordinator.offer(board.task(task_id=task_id))
        agent.turn()
    board.coordinator.offer(board.task(task_id="t-3"))
    board.start().turn()
    assert set(board.coordinator.results) == {"t-1", "t-2", "t-3"}
    (job,) = board.preparations
    assert job.package_sha256 == board.task().package
    assert job.cap_bytes == CAP_BYTES
    assert {job.prepared_folder} == {training.prepared_folder for training in board.jobs}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, sha256: write_prepared(folder, sha256, cpu="a CPU of last year"),
        lambda folder, sha256: write_prepared(folder, sha256, engine="onnxruntime 0.1"),
        lambda folder, sha256: write_prepared(folder, "1" * 64),
        lambda folder, sha256: write_prepared(folder, sha256, files={"block_0.bin": 4096}),
        lambda folder, sha256: (folder / PREPARED).write_bytes(b"{"),
        lambda folder, sha256: (folder / PREPARED).unlink(),
    ],
    ids=["another CPU", "another engine", "another package", "a file missing", "malformed", "nothing"],
)
def test_a_package_that_is_not_prepared_for_here_is_prepared_again(board, spoil) -> None:
    """A prepared folder that cannot be used here, or no longer, is made again, and the task is done."""
    agent = board.start()
    board.coordinator.offer(board.task())
    agent.turn()
    spoil(Path(board.preparations[0].prepared_folder), board.task().package)
    board.coordinator.offer(board.task(task_id="t-2"))
    agent.turn()
    assert len(board.preparations) == 2
    assert set(board.coordinator.results) == {"t-1", "t-2"}


def test_without_work_the_device_waits_as_asked(board) -> None:
    """The wait is drawn from the window that the coordinator names."""
    agent = board.start()
    board.coordinator.answers.extend([ComeBack(100.0, 110.0), NotEligible("too_small", "no", 50.0, 60.0)])
    assert 100.0 <= agent.turn() <= 110.0
    assert 50.0 <= agent.turn() <= 60.0


def test_a_task_over_the_cap_is_refused_with_numbers(board) -> None:
    """The operator of the run learns both figures, and nothing is downloaded."""
    agent = board.start()
    board.coordinator.offer(board.task(required_bytes=CAP_BYTES + 1))
    agent.turn()
    code, message = board.event()
    assert code == "task_refused"
    assert message.startswith("cap: ")
    assert "needs 65 MiB and the cap is 64.0 MiB" in message
    assert size(CAP_BYTES) in message
    assert not [request for request in board.coordinator.requests if "/blobs/" in request.path]


def test_a_task_of_another_coordinator_is_not_done(board) -> None:
    """A task whose signature is not by the pinned key is dropped before it is parsed."""
    agent = board.start()
    text = encode(board.task()).decode()
    board.coordinator.answers.append(SignedTask(text, generate_key().sign(text.encode())))
    agent.turn()
    code, message = board.event()
    assert code == "task_untrusted"
    assert message.startswith("SignatureError")
    assert board.workers == []


def test_a_package_of_another_publisher_is_never_opened(board) -> None:
    """The manifest's signature is checked before its bytes are parsed, even if they are nonsense."""
    board.manifest = b"nonsense that must not be parsed"
    agent = board.start()
    board.coordinator.offer(board.task(publisher=generate_key()))
    agent.turn()
    assert board.event()[1].startswith("SignatureError")
    assert board.workers == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slices": ("nothing",)}, "nothing"),
        ({"sequence_limit": 65}, "65 tokens"),
        ({"state": "0" * 64}, "no such blob"),
        ({"deadline_s": 0.0}, "deadline"),
    ],
)
def test_a_task_that_cannot_be_done_fails_with_its_reason(
    board, change: dict[str, object], named: str
) -> None:
    """Unknown slices, too long rows, missing blobs and a passed deadline each come back as an event."""
    agent = board.start()
    board.coordinator.offer(board.task(**change))
    agent.turn()
    code, message = board.event()
    assert code == "task_failed"
    assert named in message


def test_a_full_disk_is_told_as_such(board, monkeypatch) -> None:
    """What the system says of the disk reaches the operator, in words and without a path of the device."""
    agent = board.start()
    board.coordinator.offer(board.task())

    def full(_: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/path/of/the/device")

    monkeypatch.setattr(board.store, "keep_pending", full)
    agent.turn()
    assert board.event() == ("task_failed", "OSError: no space left on device")
    monkeypatch.undo()
    board.coordinator.offer(board.task())
    assert agent.turn() == 0.0
    assert set(board.coordinator.results) == {"t-1"}


@pytest.mark.parametrize("limit", ["max_blob_bytes", "disk_quota"])
def test_a_package_over_the_disk_limits_fails_with_numbers(board, limit: str) -> None:
    """A package larger than the operator allows is not downloaded."""
    board.config = msgspec.structs.replace(board.config, **{limit: 60})
    agent = board.start()
    board.coordinator.offer(board.task())
    agent.turn()
    assert f"{limit} is 60" in board.event()[1]


@pytest.mark.parametrize(
    ("worker", "code", "named"),
    [
        (KILLED_WORKER, "task_failed", "SIGKILL"),
        (NONSENSE_WORKER, "task_failed", "cannot be read"),
        (CAP_WORKER, "task_refused", "9 over 5"),
    ],
)
def test_a_failing_worker_costs_the_task_and_not_the_agent(board, worker: str, code: str, named: str) -> None:
    """The reason reaches the coordinator, and the next task is served."""
    agent = board.start(worker)
    board.coordinator.offer(board.task())
    assert agent.turn() <= FIRST_BACK_OFF_S
    assert board.event()[0] == code
    assert named in board.event()[1]
    assert 10.0 <= agent.turn() <= 20.0


def test_after_an_out_of_memory_kill_a_smaller_plan_does_the_task(board) -> None:
    """The task is done with a lower budget under the same cap, operators hear of it, and later plans stay small."""
    agent = board.start(GREEDY_WORKER)
    board.coordinator.offer(board.task())
    assert agent.turn() == 0.0
    code, message = board.event()
    assert code == "plan_reduced"
    assert "out of memory in phase step" in message
    assert f"the cap is {size(CAP_BYTES)}" in message
    assert board.coordinator.receipts == ["counted"]
    assert [job.cap_bytes for job in board.jobs] == [CAP_BYTES, CAP_BYTES]
    assert [job.budget_bytes for job in board.jobs] == [CAP_BYTES, CAP_BYTES * 3 // 4]
    board.coordinator.offer(board.task(task_id="t-2"))
    assert agent.turn() == 0.0
    assert [job.budget_bytes for job in board.jobs[2:]] == [CAP_BYTES * 3 // 4]


def test_a_second_out_of_memory_kill_gives_the_task_back(board) -> None:
    """Two kills end the task with its own event, the agent lives on, and the next plan starts lower."""
    agent = board.start(ALWAYS_GREEDY_WORKER)
    board.coordinator.offer(board.task())
    assert agent.turn() <= FIRST_BACK_OFF_S
    assert [event.code for event in board.coordinator.events] == ["plan_reduced", "out_of_memory"]
    last = board.coordinator.events[-1]
    assert last.task_id == "t-1"
    assert last.message.startswith("OutOfMemoryError: the worker ran out of memory in phase step")
    assert 10.0 <= agent.turn() <= 20.0
    board.coordinator.offer(board.task(task_id="t-2"))
    agent.turn()
    assert [job.budget_bytes for job in board.jobs[1:3]] == [CAP_BYTES * 3 // 4] * 2


def test_without_a_smaller_plan_the_kill_is_what_is_told(board) -> None:
    """If no plan fits the lower budget the task goes back as out of memory, and the budget is not lowered."""
    agent = board.start(STUBBORN_WORKER)
    board.coordinator.offer(board.task())
    agent.turn()
    assert [event.code for event in board.coordinator.events] == ["plan_reduced", "out_of_memory"]
    board.coordinator.offer(board.task(task_id="t-2"))
    agent.turn()
    assert board.jobs[2].budget_bytes == CAP_BYTES


def test_without_time_for_it_there_is_no_second_attempt(board) -> None:
    """A kill after more than half of the task's time gives the task back at once."""
    agent = board.start(LATE_WORKER)
    board.coordinator.offer(board.task(deadline_s=2.2))
    agent.turn()
    assert board.event()[0] == "out_of_memory"
    assert len(board.jobs) == 1


def test_a_worker_past_its_deadline_is_stopped(board) -> None:
    """The deadline counts from check-in, and no process is left behind."""
    agent = board.start(SLOW_WORKER)
    board.coordinator.offer(board.task(deadline_s=0.5))
    agent.turn()
    assert "was stopped" in board.event()[1]
    assert board.workers[0].process.poll() is not None


def test_a_broken_download_goes_on_as_long_as_it_gets_on(board) -> None:
    """Every break that brought some bytes is followed by a continuation, within the same turn."""
    agent = board.start()
    board.coordinator.offer(board.task())
    board.coordinator.broken_downloads.extend([100, 50, 25])
    assert agent.turn() == 0.0
    assert [
        request.headers["Range"] for request in board.coordinator.requests if "Range" in request.headers
    ] == [
        "bytes=100-",
        "bytes=150-",
        "bytes=175-",
    ]
    assert board.slept == [1.0, 1.0, 1.0]


def test_a_download_that_brings_nothing_is_tried_again_later(board) -> None:
    """Without progress the turn ends in a back-off; what came before is kept for the next."""
    agent = board.start()
    board.coordinator.offer(board.task())
    board.coordinator.broken_downloads.extend([100, 0])
    assert 0.0 <= agent.turn() <= FIRST_BACK_OFF_S
    assert board.coordinator.events == []
    board.coordinator.offer(board.task())
    assert board.start().turn() == 0.0
    assert [r.headers["Range"] for r in board.coordinator.requests if "Range" in r.headers][
        -1
    ] == "bytes=100-"


def test_a_blob_with_other_bytes_is_fetched_again(board) -> None:
    """A wrong blob fails the task with its digest named; the next task finds the right one."""
    agent = board.start()
    task = board.task()
    good = board.coordinator.blobs[task.state]
    board.coordinator.blobs[task.state] = b"wrong"
    board.coordinator.offer(task)
    agent.turn()
    assert board.event()[1].startswith(f"DigestError: the download of blob {task.state}")
    board.coordinator.blobs[task.state] = good
    board.coordinator.offer(task)
    assert agent.turn() == 0.0


@pytest.mark.parametrize(
    "fault", [Response(503, {"retry-after": "30"}), Response(429, {"retry-after": "30"})]
)
def test_a_result_survives_an_unreachable_coordinator_and_a_restart(board, fault: Response) -> None:
    """The result waits on the disk and goes out before anything else after the next start."""
    board.start().turn()
    board.coordinator.offer(board.task())
    board.coordinator.planned.extend([None] * 8 + [fault])
    assert board.start().turn() >= 30.0
    assert board.coordinator.results == {}
    board.coordinator.requests.clear()
    board.start().turn()
    assert board.coordinator.receipts == ["counted"]
    assert [request.path for request in board.coordinator.requests] == [
        "/v1/tasks/t-1/result",
        "/v1/check-in",
    ]


def test_a_duplicate_is_forgotten_like_a_counted_result(board) -> None:
    """If the receipt was lost, the same bytes go out again and are then dropped."""
    agent = board.start()
    board.coordinator.offer(board.task())
    agent.turn()
    from edge_runtime.protocol.messages import encode_result

    board.store.keep_pending(encode_result(board.coordinator.results["t-1"]))
    agent.turn()
    assert board.coordinator.receipts == ["counted", "duplicate"]
    assert board.store.pending() is None


def test_a_stale_result_is_dropped(board) -> None:
    """A result that the coordinator refuses as such is not sent again, and work goes on."""
    agent = board.start()
    board.coordinator.offer(board.task())
    board.coordinator.refuse_results = refusal(409, "stale", "the round is over")
    assert agent.turn() == 0.0
    assert board.store.pending() is None


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_the_device_keeps_its_result(board, status: int) -> None:
    """Being turned away says nothing about the result, so it is kept."""
    agent = board.start()
    board.coordinator.offer(board.task())
    board.coordinator.refuse_results = refusal(status, "unknown_device", "no")
    assert agent.turn() >= 0.8 * REFUSED_WAIT_S
    assert board.store.pending() is not None


def test_a_page_of_a_proxy_does_not_cost_the_result(board) -> None:
    """A 404 that the coordinator did not write decides nothing about the result."""
    agent = board.start()
    board.coordinator.offer(board.task())
    board.coordinator.refuse_results = Response(404, {}, b"<html>no such page</html>")
    assert agent.turn() <= FIRST_BACK_OFF_S
    assert board.store.pending() is not None


def test_an_unreadable_pending_result_does_not_block_the_device(board) -> None:
    """A pending file that cannot be parsed is dropped, and the device checks in."""
    agent = board.start()
    board.store.keep_pending(b"nonsense")
    assert 10.0 <= agent.turn() <= 20.0
    assert board.store.pending() is None


@pytest.mark.parametrize(
    ("answer", "shortest_s", "longest_s"),
    [
        (refusal(403, "forbidden", "no"), 0.8 * REFUSED_WAIT_S, 1.2 * REFUSED_WAIT_S),
        (Response(307, {"location": "/"}), 0.8 * REFUSED_WAIT_S, 1.2 * REFUSED_WAIT_S),
        (Response(200, {}, b"nonsense"), 0.8 * REFUSED_WAIT_S, 1.2 * REFUSED_WAIT_S),
        (Response(404, {}, b"<html>"), 0.0, FIRST_BACK_OFF_S),
        (refusal(401, "clock_off", "no"), 0.0, FIRST_BACK_OFF_S),
        (Response(502), 0.0, FIRST_BACK_OFF_S),
        (Response(503, {"retry-after": "60"}), 60.0, 60.0 + FIRST_BACK_OFF_S),
        (Response(503, {"retry-after": "soon"}), 0.0, FIRST_BACK_OFF_S),
    ],
)
def test_what_may_pass_is_tried_soon_and_a_clear_no_is_not(
    board, answer: Response, shortest_s: float, longest_s: float
) -> None:
    """Transient answers lead to a short, jittered wait; refusals and foreign answers to a long one."""
    agent = board.start()
    board.coordinator.planned.append(answer)
    assert shortest_s <= agent.turn() <= longest_s


def test_a_missing_data_file_is_told_and_tried_again(board) -> None:
    """The agent outlives a data file that is being replaced, and operators hear of it."""
    board.config.data.unlink()
    assert board.start().turn() <= FIRST_BACK_OFF_S
    assert board.event()[0] == "device_failed"


def test_an_event_that_cannot_be_sent_does_not_matter(board) -> None:
    """Telling operators is best effort: the device goes on if it fails."""
    agent = board.start(KILLED_WORKER)
    board.coordinator.offer(board.task(required_bytes=CAP_BYTES + 1))
    board.coordinator.planned.extend([None, Response(503)])
    assert agent.turn() <= FIRST_BACK_OFF_S


def test_a_stop_in_mid_training_ends_the_worker(board) -> None:
    """SIGTERM stops the worker at once and run() returns, ready to be started again."""
    agent = board.start(INTERRUPTED_WORKER)
    board.coordinator.offer(board.task())
    agent.run()
    assert board.workers[0].process.poll() is not None
    assert board.store.pending() is None


def test_a_stop_while_waiting_ends_the_run(board) -> None:
    """A signal during the sleep between turns returns from run() as well."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    board.start(sleep=interrupt).run()


def test_the_service_manager_hears_of_start_and_stop(board) -> None:
    """It is told that the agent serves before the first turn, that it lives while it waits, and that it stops."""

    class Told(ServiceManager):
        def _tell(self, state: str) -> None:
            heard.append(state)

    def interrupt(_: float) -> None:
        heard.append("asleep")
        raise KeyboardInterrupt

    heard: list[str] = []
    manager = Told({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "60000000"})
    board.start(sleep=interrupt, service_manager=manager).run()
    assert heard == ["READY=1", "WATCHDOG=1", "asleep", "STOPPING=1"]


def test_a_device_enrols_once(board) -> None:
    """The first start enrols with the token; later starts need none."""
    board.start()
    board.config = msgspec.structs.replace(board.config, enrolment_token=None)
    board.start()
    paths = [request.path for request in board.coordinator.requests]
    assert paths == ["/v1/devices/enrol"]
    assert board.store.identity().device_id == DEVICE_ID


def test_without_a_token_there_is_no_enrolment(board) -> None:
    """A device that is neither enrolled nor has a token says what is missing."""
    board.config = msgspec.structs.replace(board.config, enrolment_token=None)
    with pytest.raises(ConfigError, match="enrolment_token"):
        board.start()


def test_a_refused_token_is_reported_with_its_code(board) -> None:
    """The coordinator's reason code reaches whoever started the program."""
    board.config = msgspec.structs.replace(board.config, enrolment_token="x" * 16)
    with pytest.raises(RefusedError, match="unknown_token"):
        board.start()


def test_a_pinned_key_must_be_the_coordinators(board) -> None:
    """A coordinator that presents another key than the configuration pins is not served."""
    board.config = msgspec.structs.replace(board.config, coordinator_public_key=generate_key().public_key)
    with pytest.raises(SignatureError, match="pins"):
        board.start()


@given(st.integers(0, 100), st.integers(0, 2**32))
def test_back_off_is_jittered_and_bounded(failures: int, seed: int) -> None:
    """However often something fails, the wait is between zero and the longest back-off."""
    pace = Pace(random.Random(seed))
    waits = [pace.failed() for _ in range(failures + 1)]
    assert all(0.0 <= wait <= LONGEST_BACK_OFF_S for wait in waits)
    assert waits[0] <= FIRST_BACK_OFF_S
    pace.done()
    assert pace.failed() <= FIRST_BACK_OFF_S


@given(st.text())
def test_a_value_cannot_forge_a_log_line(value: str) -> None:
    """Whatever a value holds, the log line is one line of key=value."""
    line = _line("phase", {"message": value})
    assert line.isprintable()
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_revoked_device_ends(board, late: bool) -> None:
    """Revoked at its check-in or with a result in its hands, the agent ends, tells how to come back, and keeps it."""
    agent = board.start()
    if late:
        board.coordinator.offer(board.task())
        board.coordinator.refuse_results = refusal(403, "revoked", "this device was revoked")
    else:
        board.coordinator.planned.append(refusal(403, "revoked", "this device was revoked"))
    with pytest.raises(
        RefusedError, match=r"revoked.*remove .*identity\.json, give it a new token"
    ) as caught:
        agent.run()
    assert caught.value.exit_code == 22
    assert (board.store.pending() is not None) == late


def test_a_revoked_device_without_its_data_ends(board) -> None:
    """A device that only tells of its own fault hears from the answer that it was revoked, and ends."""
    agent = board.start()
    board.config.data.unlink()
    board.coordinator.planned.append(refusal(403, "revoked", "this device was revoked"))
    with pytest.raises(RefusedError, match="this device was revoked"):
        agent.turn()
    assert agent.turn() > 0
    assert [event.code for event in board.coordinator.events] == ["device_failed"]


def test_operators_are_told_which_causes_last(board) -> None:
    """A wrong publisher key, a file over its limit and too small a cap last; a killed worker may pass."""
    agent = board.start(KILLED_WORKER)
    for task in (
        board.task(publisher=generate_key()),
        board.task(required_bytes=CAP_BYTES + 1),
        board.task(task_id="t-2"),
    ):
        board.coordinator.offer(task)
        agent.turn()
    limited = msgspec.structs.replace(board.config, max_blob_bytes=1)
    board.config = limited
    board.coordinator.offer(board.task(task_id="t-3"))
    board.start().turn()
    assert [event.lasting for event in board.coordinator.events] == [True, True, False, True]


def test_a_device_tells_when_it_was_set_up_anew(board) -> None:
    """Check-ins carry the same digest until the operator changes something, a restart alone included."""
    board.start().turn()
    board.start().turn()
    board.config = msgspec.structs.replace(board.config, publisher_key=generate_key().public_key)
    board.start().turn()
    first, second, third = (request.setup for request in board.coordinator.check_ins)
    assert first == second != ""
    assert third not in ("", first)
