"""A device and its releases: fetched, checked on its own rows, and only then used; every way that goes wrong."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.agent.client import Client
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.agent.daemon import Agent
from edge_runtime.agent.enrolment import ensure_identity
from edge_runtime.agent.store import RELEASE, Store, TakenRelease
from edge_runtime.errors import ConfigError
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import ComeBack, NotEligible, Release, SignedRelease, encode
from edge_runtime.protocol.signing import PrivateKey, generate_key
from edge_runtime.worker.jobs import EvaluateJob, Job, PrepareJob
from edge_runtime.worker.process import RunningWorker, start_worker
from tests.edge_runtime.packages import FILES, make_manifest, write_prepared
from tests.edge_runtime.simulator import TOKEN, CoordinatorSimulator

PUBLISHER = generate_key()
CAP_BYTES = 64 << 20
#: Stands in for the worker: it prepares nothing, and scores what its last argument says.
WORKER = """
import json, sys
job = json.load(sys.stdin)
memory = {"predicted_peak_bytes": 0, "high_water_bytes": 4, "cap_bytes": job["cap_bytes"]}
if job["type"] == "prepare":
    print(json.dumps({"arithmetic": "float", "candidates": [], "seconds": 0.1, "memory": memory}))
else:
    accuracy, loss = map(float, sys.argv[1:])
    assert open(job["state_path"], "rb").read().startswith(b"values")
    print(json.dumps({"rows": 3, "accuracy": accuracy, "mean_loss": loss, "seconds": 0.1, "memory": memory}))
"""


class Board:
    """A device before a simulated coordinator that publishes releases."""

    def __init__(self, folder: Path) -> None:
        self.coordinator = CoordinatorSimulator()
        self.jobs: list[Job] = []
        self.scores = (0.9, 0.4)
        self.manifest = msgspec.json.encode(make_manifest())
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
            train=False,
        )

    def start(self) -> Agent:
        """The agent as a fresh process would build it."""
        self.store = Store(self.config.state_folder, disk_quota_bytes=self.config.disk_quota)
        identity = ensure_identity(self.config, self.store, self.coordinator)
        client = Client(self.coordinator, self.store.key(), identity.device_id)

        def launch(job: Job) -> RunningWorker:
            self.jobs.append(job)
            if isinstance(job, PrepareJob):
                write_prepared(Path(job.prepared_folder), job.package_sha256)
            return start_worker(job, [sys.executable, "-c", WORKER, *map(str, self.scores)])

        return Agent(
            self.config,
            self.store,
            client,
            identity,
            launch=launch,
            sleep=lambda _: None,
            source=random.Random(1),
        )

    def tell(
        self, number: int, values: bytes = b"values", signer: PrivateKey | None = None, **changes: Any
    ) -> Release:
        """Answer the next check-in with a release."""
        for data in FILES.values():
            self.coordinator.add_blob(data)
        release = Release(
            number=number,
            run_id="r-1",
            round=3,
            package=self.coordinator.add_blob(self.manifest),
            package_signature=PUBLISHER.sign(self.manifest),
            values=self.coordinator.add_blob(values),
            sequence_limit=16,
        )
        release = msgspec.structs.replace(release, **changes)
        text = encode(release).decode()
        signed = SignedRelease(text, (signer or self.coordinator.key).sign(text.encode()))
        self.coordinator.answers.append(ComeBack(10.0, 20.0, "no run", signed))
        return release

    @property
    def current(self) -> TakenRelease | None:
        """The release in use, as another process reads it."""
        return Store(self.config.state_folder, disk_quota_bytes=1 << 30).releases.state().current

    def events(self) -> list[tuple[str, str]]:
        """Codes and messages that have arrived, which are then forgotten."""
        found = [(event.code, event.message) for event in self.coordinator.events]
        self.coordinator.events.clear()
        return found


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A device that takes no tasks and has rows to check releases on."""
    return Board(tmp_path)


def test_a_release_is_fetched_checked_and_used(board: Board) -> None:
    """Without ever training, the device holds package and values, and tells what it found."""
    agent, release = board.start(), board.tell(1, lowest_accuracy=0.8, highest_loss=0.5)
    assert 10 <= agent.turn() <= 20
    taken = board.current
    assert taken == TakenRelease(release, 0.9, 0.4, 3)
    assert board.store.releases.values_path(taken).read_bytes() == b"values"
    Package.open(board.store.packages.folder_of(release.package), PUBLISHER.public_key).verify_files()
    assert board.events() == [
        ("release_taken", "release 1: accuracy 0.900, mean loss 0.400 on the 3 rows here")
    ]
    agent.turn()
    first, second = board.coordinator.check_ins
    assert (first.trains, first.release, second.release) == (False, 0, 1)


def test_what_falls_below_a_limit_is_not_used(board: Board) -> None:
    """The device goes on with the release before, tells why, and is not told again, across a restart."""
    agent, first = board.start(), board.tell(1)
    agent.turn()
    board.scores = (0.6, 0.9)
    board.tell(2, b"values, worse", lowest_accuracy=0.7)
    agent.turn()
    board.tell(3, b"values, worse still", highest_loss=0.5)
    agent.turn()
    assert board.current.release == first
    assert board.store.releases.values_path(board.current).read_bytes() == b"values"
    assert [code for code, _ in board.events()] == ["release_taken", "release_refused", "release_refused"]
    board.start().turn()
    assert board.coordinator.check_ins[-1].release == 3


def test_the_messages_name_figure_limit_and_what_goes_on(board: Board) -> None:
    """Accuracy and loss each have their words, and they quote nothing of the rows."""
    board.scores = (0.6, 0.9)
    agent = board.start()
    board.tell(1, lowest_accuracy=0.7)
    board.tell(2, highest_loss=0.5)
    agent.turn()
    agent.turn()
    assert board.events() == [
        (
            "release_refused",
            "release 1: on the 3 rows here its accuracy is 0.600, and the release asks for 0.7 or more; "
            "the device goes on with no release",
        ),
        (
            "release_refused",
            "release 2: on the 3 rows here its mean loss is 0.900, and the release asks for 0.5 or less; "
            "the device goes on with no release",
        ),
    ]


def test_a_switch_is_whole_at_every_moment(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the values are written and before the name is changed leaves the release before."""
    import edge_runtime.agent.store as store_module

    agent, first = board.start(), board.tell(1)
    agent.turn()
    written = store_module.write_durably

    def cut(path: Path, data: bytes, *, mode: int = 0o644) -> None:
        if path.name == RELEASE:
            raise OSError(28, "No space left on device")
        written(path, data, mode=mode)

    monkeypatch.setattr(store_module, "write_durably", cut)
    second = board.tell(2, b"values, newer")
    agent.turn()
    assert board.current.release == first
    assert board.store.releases.values_path(board.current).read_bytes() == b"values"
    monkeypatch.undo()
    board.tell(2, b"values, newer")
    agent.turn()
    assert board.current.release == second
    assert board.store.releases.values_path(board.current).read_bytes() == b"values, newer"


def test_only_the_values_in_use_and_those_before_stay(board: Board) -> None:
    """Whoever has just read the old name still finds its values; older ones go."""
    agent = board.start()
    for number in (1, 2, 3):
        board.tell(number, f"values {number}".encode())
        agent.turn()
    folder = board.store.releases.values_path(board.current).parent
    assert sorted(path.read_bytes() for path in folder.iterdir()) == [b"values 2", b"values 3"]


def test_somebody_elses_release_is_not_even_read(board: Board) -> None:
    """A signature by another key is told and changes nothing; the next true release is taken."""
    agent = board.start()
    board.tell(5, signer=generate_key())
    agent.turn()
    assert board.current is None
    ((code, message),) = board.events()
    assert code == "release_untrusted"
    assert "SignatureError" in message
    board.tell(1)
    agent.turn()
    assert board.current.release.number == 1


def test_an_older_release_is_not_taken_again(board: Board) -> None:
    """Whoever plays back an old answer moves no device back."""
    agent = board.start()
    board.tell(2, b"values, newer")
    board.tell(1, b"values, older")
    agent.turn()
    agent.turn()
    assert board.current.release.number == 2
    assert len(board.events()) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"disk_quota": 50}, "disk_quota is 50 bytes"),
        ({"max_blob_bytes": 20}, "max_blob_bytes is 20 bytes"),
        ({"publisher_key": generate_key().public_key}, "SignatureError"),
    ],
)
def test_a_release_that_does_not_fit_the_configuration_is_refused(
    board: Board, settings: dict[str, Any], reason: str
) -> None:
    """It is told once, with the limit, and counts as decided until the configuration changes."""
    good = board.config
    board.config = msgspec.structs.replace(board.config, **settings)
    agent = board.start()
    board.tell(1)
    agent.turn()
    ((code, message),) = board.events()
    assert code == "release_refused"
    assert reason in message
    agent.turn()
    assert board.coordinator.check_ins[-1].release == 1
    board.config = good
    board.tell(1)
    board.start().turn()
    assert board.coordinator.check_ins[-1].release == 0
    assert board.current.release.number == 1


FAILING = """
import json, sys
job = json.load(sys.stdin)
print(json.dumps({"kind": "KIND", "message": "as it is"}))
sys.exit(3)
"""


@pytest.mark.parametrize(
    "kind", ["SliceError", "DataError", "OutOfMemoryError", "WorkerError", "PreparationError"]
)
def test_whatever_a_worker_meets_costs_the_release_alone(
    board: Board, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that do not fit, rows that cannot be read, memory that is short: the agent goes on as before."""
    monkeypatch.setattr(sys.modules[__name__], "WORKER", FAILING.replace("KIND", kind))
    agent = board.start()
    board.tell(1)
    assert 10 <= agent.turn() <= 20
    ((code, message),) = board.events()
    assert (code, kind in message) == ("release_refused", True)
    assert board.current is None


def test_values_that_the_coordinator_lost_cost_the_release_alone(board: Board) -> None:
    """A blob that is not there is told, and the device does not wait an hour for it."""
    agent, release = board.start(), board.tell(1)
    del board.coordinator.blobs[release.values]
    assert 10 <= agent.turn() <= 20
    ((code, message),) = board.events()
    assert (code, "no such blob" in message) == ("release_refused", True)


def test_a_malformed_release_is_told_and_changes_nothing(board: Board) -> None:
    """Signed by the right key and no release all the same: the device asks on in its window."""
    text = '{"number": 0}'
    signed = SignedRelease(text, board.coordinator.key.sign(text.encode()))
    agent = board.start()
    board.coordinator.answers.append(ComeBack(10.0, 20.0, "no run", signed))
    assert 10 <= agent.turn() <= 20
    assert [code for code, _ in board.events()] == ["release_untrusted"]


def test_a_full_disk_is_waited_for(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where downloads do not fit now, nothing is decided."""
    import shutil

    agent = board.start()
    board.tell(1)
    full = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    agent.turn()
    assert [code for code, _ in board.events()] == ["device_failed"]
    monkeypatch.undo()
    board.tell(1)
    agent.turn()
    assert board.current.release.number == 1


def test_a_download_that_fails_is_tried_again(board: Board) -> None:
    """Where the coordinator goes away in between, nothing is decided, and the next turn ends it."""
    agent = board.start()
    release = board.tell(1)
    board.coordinator.broken_downloads.extend([0] * 3)
    agent.turn()
    assert board.current is None
    board.coordinator.broken_downloads.clear()
    board.tell(1)
    agent.turn()
    assert board.current.release == release


def test_a_device_without_rows_takes_the_operators_word(board: Board) -> None:
    """It has nothing to check, says so, and runs no check."""
    board.config = msgspec.structs.replace(board.config, data=None)
    agent = board.start()
    board.tell(1, lowest_accuracy=0.99)
    agent.turn()
    assert board.current.release.number == 1
    assert board.events() == [("release_taken", "release 1: no rows here to check it on")]
    assert not any(isinstance(job, EvaluateJob) for job in board.jobs)


def test_a_device_that_no_run_asks_is_told_too(board: Board) -> None:
    """An answer that it is not eligible brings a release as well."""
    agent = board.start()
    release = board.tell(1)
    answer = board.coordinator.answers.pop()
    board.coordinator.answers.append(NotEligible("cap_too_small", "no", release=answer.release))
    agent.turn()
    assert board.current.release == release


def test_the_package_in_use_outlives_a_task_on_another(board: Board, tmp_path: Path) -> None:
    """Laying out and preparing another package removes neither the release's package nor its prepared folder."""
    agent = board.start()
    release = board.tell(1)
    agent.turn()
    other = "f" * 64
    board.store.packages.clear_except(other)
    board.store.prepared_folder(other)
    assert board.store.packages.folder_of(release.package).is_dir()
    assert board.store.prepared_place(release.package).is_dir()


def test_a_damaged_release_file_is_set_aside(board: Board) -> None:
    """Who reads it is told; the agent keeps it under another name as it starts, and takes the next release."""
    agent = board.start()
    board.tell(1)
    agent.turn()
    place = board.config.state_folder / RELEASE
    place.write_text("{")
    agent = board.start()
    with pytest.raises(ConfigError, match=r"release\.json: .*; the agent sets it aside when it starts"):
        board.store.releases.state()
    with board.store.locked():
        board.tell(2)
        agent.turn()
    assert board.current.release.number == 2
    assert place.with_name("release.json.damaged").read_text() == "{"


def test_who_trains_needs_rows(tmp_path: Path) -> None:
    """Without data a configuration must say that the device does not train; the message says how."""
    path = tmp_path / "device.toml"
    lines = (
        'coordinator_url = "http://localhost"\nstate_folder = "state"\ndevice_name = "a"\ndevice_class = "b"\n'
        f'publisher_key = "{PUBLISHER.public_key}"\ncap = "256M"\n'
    )
    path.write_text(lines)
    with pytest.raises(ConfigError, match="a key is missing: data; or set train = false"):
        load_config(path)
    path.write_text(f"{lines}train = false\n")
    assert load_config(path).data is None
