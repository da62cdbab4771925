"""A device is killed or stopped at random instants, has a wrong clock, or a full or read-only disk: same final bits."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end import harness
from tests.end_to_end.harness import ROOT, Device, Fleet, command
from tests.end_to_end.workshop import Workshop, rows

#: Interruptions; ``make test-faults`` asks for 200.
KILLS = int(os.environ.get("EDGE_KILLS", "4"))
ONE_DEVICE = {"devices_per_round": 1, "min_devices": 1, "min_results": 1}
#: How much of the disk is free: too little for the downloads, for preparing, for the work, for the result.
LEVELS = (0, 24 << 10, 160 << 10, 310 << 10, 330 << 10, 350 << 10, 420 << 10, 480 << 10, 560 << 10)
FAULTS = re.compile(r"(?:phase=(?:device_failed|task_failed) .*|cannot use .*)")
#: About how long an agent takes from its start to its first check-in.
START_S = 1.0
#: Long enough a task to be met in its middle; and time enough for it, since a round that is abandoned for its deadline
#: has a number, and the next one's directions are others.
LONG = {
    "steps": 60,
    "deadline_s": 3600.0,
    "local_optimizer": {"name": "adamw", "slice_rate": 0.01, "head_rate": 0.01},
}


class Site(Fleet):
    """A fleet of one device, the bytes that its undisturbed run ended with, and how long a round of it took."""

    undisturbed = b""
    round_s = 0.0


@pytest.fixture(scope="module")
def site(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A coordinator and one device, which has done a run of one round undisturbed."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Site(tmp_path_factory.mktemp("interrupted") / "fleet", workshop.package()) as fleet,
    ):
        patch.setattr(harness, "PATIENCE_S", max(harness.PATIENCE_S, 20.0 * KILLS))  # runs are longer, too
        first = fleet.create_run(rounds=rounds(), **ONE_DEVICE, **LONG)
        device = fleet.add_device("ash", rows()[:24])
        odd = str(ROOT / "tests/faults/odd_device")
        device.program.environment |= {
            "PYTHONPATH": os.pathsep.join([odd, str(ROOT)]),
            "EDGE_KEEP_OFTEN": "1",
        }
        run = fleet.wait_until_finished()
        fleet.round_s = sum(entry.seconds or 0.0 for entry in run.rounds) / len(run.rounds)
        fleet.undisturbed = fleet.admin.slices(first)
        device.program.kill()
        device.program.start()  # odd from now on
        yield fleet


def rounds() -> int:
    """So many rounds that they last for most interruptions, of which about one in four lets a task end."""
    return 1 + KILLS // 4


def again(fleet: Site, **changes: object) -> tuple[Device, bytes]:
    """The same run once more; the device, and the bytes that the undisturbed run ended with."""
    fleet.create_run(**{"rounds": rounds(), **ONE_DEVICE, **LONG, **changes})
    return fleet.devices["ash"], fleet.undisturbed


def assert_whole(fleet: Fleet, wanted: bytes) -> None:
    """The run has finished with these bytes, no result lost or doubled, and no file of the device is unreadable."""
    run = fleet.wait_until_finished()
    assert {entry.state for entry in run.rounds} == {"committed"}, fleet.admin.events()
    assert fleet.admin.slices() == wanted
    found = fleet.query(
        "SELECT run_id, count(*), count(DISTINCT task_id), count(DISTINCT round)"
        " FROM results JOIN tasks USING (task_id) GROUP BY run_id"
    )
    assert (run.run_id, *(rounds(),) * 3) in found
    device = fleet.devices["ash"]
    fleet.wait("the acknowledgement", lambda: not device.pending.exists())
    assert device.program.stop() in (0, -signal.SIGTERM)  # it may still be loading its libraries
    done = command("edge_runtime.cli", "status", "--config", device.folder / "device.toml")
    assert done.returncode == 0, done.stderr
    assert not list((device.folder / "state").rglob("*.damaged"))
    device.program.start()


def test_interruptions_cost_no_bit(site: Site) -> None:
    """Killed with its worker, killed alone, or told to stop, at random instants from its start to a task's end."""
    lot = random.Random(11)
    device, wanted = again(site)
    log = len(device.log)
    for _ in range(KILLS):
        time.sleep(lot.uniform(0.0, START_S + 1.5 * site.round_s))
        how = lot.choice(("kill", "kill alone", "stop"))
        if how == "stop":
            began_s = time.monotonic()
            assert device.program.stop() in (0, -signal.SIGTERM)  # it may still be loading its libraries
            assert time.monotonic() - began_s < 10
        else:
            device.program.kill(with_children=how == "kill")
        device.program.start()
    assert_whole(site, wanted)
    print(f"{KILLS} interruptions, resumed {device.log[log:].count('event=resumed')} times")


def test_a_task_goes_on_where_it_stood(site: Site) -> None:
    """Stopped in mid-task, the agent ends within 10 s; started again, its worker takes up the steps that are left."""
    device, wanted = again(site)
    log = len(device.log)
    site.wait("a step", (device.folder / "state/task.progress").exists)
    began_s = time.monotonic()
    assert device.program.stop() == 0
    assert time.monotonic() - began_s < 10
    device.program.start()
    assert_whole(site, wanted)
    assert "event=resumed step=" in device.log[log:]


@pytest.mark.parametrize("off_s", [-86400, 86400])
def test_a_clock_that_is_off_by_a_day(site: Site, off_s: int) -> None:
    """The device signs by the coordinator's clock, says so in its log, and ends with the same bytes."""
    device, wanted = again(site)
    device.program.kill()
    log = len(device.log)
    device.program.environment["EDGE_CLOCK_OFF_S"] = str(off_s)
    try:
        device.program.start()
        assert_whole(site, wanted)
        assert "phase=clock_corrected" in device.log[log:]
    finally:
        device.program.kill()
        device.program.environment["EDGE_CLOCK_OFF_S"] = "0"
        device.program.start()


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """The device's state folder on a disk of 4 MiB of its own, with nothing on it but what enrolment left."""
    device = site.devices["ash"]
    device.program.kill()
    state = device.folder / "state"
    kept = {name: (state / name).read_bytes() for name in ("device.key", "identity.json")}
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", state], check=False).returncode:
        device.program.start()
        pytest.skip("no file system can be mounted here")
    try:
        for name, data in kept.items():
            (state / name).write_bytes(data)
        yield state
    finally:
        device.program.kill()
        subprocess.run(["umount", "--lazy", state], check=True)
        device.program.start()


def test_a_full_disk_costs_its_tasks_alone(site: Site, small_disk: Path) -> None:
    """Full while it downloads, prepares, trains or hands in: it is told, nothing is lost, and the next run is sound."""
    device, _ = again(site, rounds=len(LEVELS), max_abandoned=100)
    said = set()
    ballast = small_disk / "ballast"
    for free_bytes in LEVELS:
        log = len(device.log)
        fill(ballast, free_bytes)
        device.program.start()
        site.wait("a fault or a result", partial(_told, device, log))
        said |= set(FAULTS.findall(device.log[log:]))
        device.program.kill()
        ballast.unlink()
    device.program.start()
    site.wait_until_finished()
    assert site.query("SELECT count(*) - count(DISTINCT task_id) FROM results") == [(0,)]
    _, wanted = again(site)
    assert_whole(site, wanted)
    print(f"faults met: {sorted(said)}")
    assert len(said) > 1


def _told(device: Device, start: int) -> bool:
    """Whether the device's log says of a fault, or of a round without one, since a place in it."""
    log = device.log[start:]
    return "phase=result_delivered" in log or FAULTS.search(log) is not None


def fill(ballast: Path, free_bytes: int) -> None:
    """Leave so much of a disk free."""
    with ballast.open("wb") as file:
        disk = os.statvfs(ballast.parent)
        file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - free_bytes)))


def test_a_read_only_state_folder_is_told(site: Site, small_disk: Path) -> None:
    """At the start it ends with one line and a code that asks for another try; as it runs it waits, and goes on."""
    device, wanted = again(site)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = command("edge_runtime.cli", "run", "--config", device.folder / "device.toml")
    assert done.returncode == 19
    assert "cannot use state_folder" in done.stderr.splitlines()[-1]
    assert "read-only" in done.stderr.splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    device.program.start()
    assert_whole(site, wanted)
