"""The coordinator's disk is full at many moments of a run: everything waits, and nothing is lost or counted twice."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.storage.trouble import trouble_of
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, SignedTask, Task
from tests.coordinator.conftest import World, slice_spec

#: Moments at which the disk is full.
INSTANTS = 60
#: Results of 80 kB, so that some fail in the middle.
SPECS = (slice_spec("s0", 0, (1, 100, 200)), slice_spec("head", 1, (1, 2, 2), "head"))
PAGE_BYTES = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own, of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


class Disk:
    """A disk that is filled up to some bytes and freed again."""

    def __init__(self, folder: Path) -> None:
        self.filler = folder / "filler"

    def fill(self, left_bytes: int) -> None:
        """Leave so many bytes at most."""
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(PAGE_BYTES))
            except OSError:
                os.ftruncate(file.fileno(), max(0, file.tell() - left_bytes))

    def free(self) -> None:
        """Make room again."""
        self.filler.unlink()


def patiently(step: Callable[[], Any]) -> bool:
    """Whether a step could be made; what stops it must be trouble that passes, as the loops behind the API take it."""
    try:
        answer = step()
    except (OSError, sqlite3.Error) as error:
        assert trouble_of(error) is not None, error
        return False
    if isinstance(answer, httpx.Response) and answer.status_code == 503:
        assert int(answer.headers["Retry-After"]) > 0
        return False
    assert not isinstance(answer, httpx.Response) or answer.status_code == 200, answer.text
    return True


def run_through(world: World, disk: Disk | None) -> tuple[bytes, int, int]:
    """A run of ten rounds; its values, and how often the disk was full, and stopped a step."""
    source = random.Random(3)
    devices = world.fleet("a", "b")
    world.create_run(rounds=10, split="whole", deadline_s=3600.0, selection_timeout_s=3600.0)
    check_in = messages.encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))
    full = stopped = 0

    def attempt(step: Callable[[], Any]) -> None:
        nonlocal full, stopped
        if disk is not None:
            disk.fill(PAGE_BYTES * source.choice((0, 0, 1, 2, 4, 8, 16, 24)))
            full += 1
            stopped += not patiently(step)
            disk.free()
        assert patiently(step)

    while world.run()["state"] != "finished":
        attempt(world.play)
        for device in devices:
            attempt(lambda device=device: device.send("POST", "/v1/check-in", check_in))
            answer = device.check_in()
            if isinstance(answer, SignedTask):
                task = messages.decode(answer.task.encode(), Task)
                attempt(lambda device=device, task=task: device.deliver(device.result(task)))
        attempt(world.play)
    return world.values(), full, stopped


def test_a_full_disk_costs_nothing(small_disk: Path, tmp_path: Path) -> None:
    """With no room at sixty moments a run ends in the bits of one with room, each result counted once."""
    (tmp_path / "roomy").mkdir()
    roomy = World(tmp_path / "roomy", specs=SPECS)
    expected, _, _ = run_through(roomy, None)
    world = World(small_disk, roomy.publisher, specs=SPECS)
    values, full, stopped = run_through(world, Disk(small_disk))
    print(f"disk full at {full} moments, which stopped {stopped} steps: the same bits")
    assert full >= INSTANTS
    assert stopped >= full // 4
    assert values == expected
    with world.stores.storage.reading() as connection:
        counted = connection.execute("SELECT count(*), count(DISTINCT task_id) FROM results").fetchone()
    assert tuple(counted) == (20, 20)
    world.stores.storage.close()
    roomy.stores.storage.close()
