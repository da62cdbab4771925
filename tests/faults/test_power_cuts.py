"""The power is cut at random moments: whatever was not flushed may be gone, and the next start goes on."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.durable import write_durably
from edge_runtime.errors import WorkerError
from edge_runtime.package.package import Package
from edge_runtime.protocol.messages import CheckInRequest, ComeBack, SignedTask, decode, encode
from edge_runtime.training.progress import Keeper, Progress
from tests.edge_runtime.agent.test_daemon import Board
from tests.edge_runtime.agent.test_release import PUBLISHER
from tests.edge_runtime.agent.test_release import Board as ReleaseBoard
from tests.edge_runtime.simulator import CoordinatorSimulator, ok
from tests.faults.power_cuts import Disk, PowerCutError

#: Cuts in each scenario; ``make test-faults`` asks for more.
CUTS = int(os.environ.get("EDGE_POWER_CUTS", "4"))


class Patient(CoordinatorSimulator):
    """A coordinator that answers with the same task until its result has come."""

    task: SignedTask | None = None

    def _serve(self, request):
        if request.path == "/v1/check-in" and self.task is not None:
            self.check_ins.append(decode(request.body, CheckInRequest))
            return ok(ComeBack(1.0, 2.0) if self.results else self.task)
        return super()._serve(request)


def task_board(folder: Path) -> Board:
    """A device that enrolled, and a coordinator with a task for it."""
    folder.mkdir()
    board = Board(folder)
    board.coordinator = Patient()
    text = encode(board.task()).decode()
    board.coordinator.task = SignedTask(text, board.coordinator.key.sign(text.encode()))
    return board


def work(board: Board) -> None:
    """Start the agent and take turns until its result was acknowledged."""
    agent = board.start()
    with board.store.locked():
        for _ in range(6):
            agent.turn()
            if board.coordinator.results and board.store.pending() is None:
                return
    pytest.fail(f"no result: {board.coordinator.events}")


def test_a_task_survives_a_cut_at_any_moment(tmp_path: Path) -> None:
    """From the first start to the receipt: the result comes once, and no file of the state folder stays unreadable."""
    lot = random.Random(5)
    counted = task_board(tmp_path / "whole")
    disk = Disk(counted.config.state_folder, tmp_path / "nowhere", lot)
    with disk.recording():
        work(counted)
    assert disk.moments > 40
    for number in range(CUTS):
        board = task_board(tmp_path / str(number))
        left = board.folder / "left"
        cut_at = lot.randint(1, disk.moments)
        Disk(board.config.state_folder, left, lot, cut_at).cut_during(partial(work, board))
        before = len(board.coordinator.receipts)
        board.config = msgspec.structs.replace(board.config, state_folder=left)
        work(board)
        assert board.coordinator.results["t-1"].change == b"the change", cut_at
        assert board.coordinator.receipts[before:] in ([], ["counted"], ["duplicate"]), cut_at
        assert board.coordinator.receipts.count("counted") == 1, cut_at
        assert not list(left.rglob("*.tmp")), cut_at


def take(board: ReleaseBoard) -> None:
    """Start the agent, and take turns until it uses the second of two releases."""
    for number in (1, 2):
        for _ in range(3):
            agent = board.start()
            with board.store.locked():
                if board.store.releases.state().decided < number:
                    board.tell(number)
                agent.turn()


def test_a_release_survives_a_cut_at_any_moment(tmp_path: Path) -> None:
    """Whatever the cut leaves names a release whose package and values are whole, or none; the next is taken."""
    lot = random.Random(7)
    counted = ReleaseBoard(_made(tmp_path / "whole"))
    disk = Disk(counted.config.state_folder, tmp_path / "nowhere", lot)
    with disk.recording():
        take(counted)
    assert counted.current.release.number == 2
    for number in range(CUTS):
        board = ReleaseBoard(_made(tmp_path / str(number)))
        left = tmp_path / f"left-{number}"
        cut_at = lot.randint(1, disk.moments)
        Disk(board.config.state_folder, left, lot, cut_at).cut_during(partial(take, board))
        board.config = msgspec.structs.replace(board.config, state_folder=left)
        board.start()
        taken = board.store.releases.state().current
        if taken is not None:
            assert board.store.releases.values_path(taken).read_bytes() == b"values", cut_at
            package = board.store.packages.folder_of(taken.release.package)
            Package.open(package, PUBLISHER.public_key).verify_files()
        take(board)
        assert board.current.release.number == 2, cut_at


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_progress_survives_a_cut_at_any_moment(tmp_path: Path) -> None:
    """What is left of a task's progress is one whole state that was kept, or none."""
    lot = random.Random(9)

    def keep(folder: Path) -> None:
        for number in range(1, 6):
            tensors = {"delta/a": np.full(1000, number, np.float32)}
            with pytest.raises(WorkerError):
                Keeper(folder / "task.progress", "a" * 64, lambda: True).after_step(
                    lambda: Progress(number, (0,), number, 0.5, tensors)  # noqa: B023 - called at once
                )

    disk = Disk(_made(tmp_path / "whole"), tmp_path / "nowhere", lot)
    with disk.recording():
        keep(tmp_path / "whole")
    for cut in range(2 * CUTS):
        folder, left = _made(tmp_path / str(cut)), tmp_path / f"left-{cut}"
        Disk(folder, left, lot, lot.randint(1, disk.moments)).cut_during(partial(keep, folder))
        found = Keeper(left / "task.progress", "a" * 64, lambda: False).before()
        assert found is None or set(found.tensors["delta/a"]) == {float(found.number)}


def test_the_model_loses_what_was_not_flushed(tmp_path: Path) -> None:
    """A file that is written without a flush is lost or cut short in most cuts; one written durably never is."""
    lost, lot = 0, random.Random(3)
    for number in range(40):
        folder, left = _made(tmp_path / str(number)), tmp_path / f"left-{number}"
        with pytest.raises(PowerCutError), Disk(folder, left, lot, 7).recording():
            write_durably(folder / "sure", b"sure" * 100)  # the seventh moment is its last: it cleans up
            (folder / "unsure").write_bytes(b"unsure" * 100)
            for _ in range(9):
                (folder / "unsure").open("rb").close()
        assert (left / "sure").read_bytes() == b"sure" * 100
        lost += not (left / "unsure").exists() or (left / "unsure").read_bytes() != b"unsure" * 100
    assert lost > 20
