"""Eight devices behind bad lines: late, slow, lossy and cut; a run ends as it does on a clean network."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.end_to_end.harness import Fleet
from tests.end_to_end.workshop import open_workshop, rows
from tests.network.bad_lines import HUB, Quality, bad_lines, unavailable

DEVICES = 8
ROUNDS = int(os.environ.get("EDGE_NETWORK_ROUNDS", "10"))
RUN = {
    "rounds": ROUNDS,
    "devices_per_round": DEVICES,
    "min_devices": DEVICES,
    "min_results": DEVICES,
    "steps": 2,
    "selection_timeout_s": 600.0,
    "deadline_s": 900.0,
}


def test_a_run_over_bad_lines_ends_in_the_same_bytes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rounds over lines with 150 to 200 ms, 2 % loss, 256 kbit/s up and cuts of 3 s: no bit differs."""
    if reason := unavailable():
        pytest.skip(reason)
    monkeypatch.setattr("tests.end_to_end.harness.PATIENCE_S", 1800.0)
    workshop = open_workshop(tmp_path_factory.getbasetemp() / "workshop")
    with (
        bad_lines(DEVICES, Quality(), seed=3) as (lines, spaces),
        Fleet(tmp_path / "fleet", workshop.package(), options=("--host", HUB, "--insecure-http")) as fleet,
    ):
        clean = fleet.create_run(**RUN)
        for number in range(DEVICES):
            own = rows()[8 * number : 8 * number + 8]
            fleet.add_device(f"device-{number}", own, threads=1, allow_insecure_http=True)
        fleet.wait_until_finished()  # the devices are on the coordinator's machine
        assert lines.counts.carried == 0
        for device in fleet.devices.values():
            assert device.program.stop() == 0
        fleet.create_run(**RUN)
        began_s = time.monotonic()
        for space, device in zip(spaces, fleet.devices.values(), strict=True):
            device.program.prefix = ("ip", "netns", "exec", space)
            device.program.start()
        run = fleet.wait_until_finished()
        print(f"{ROUNDS} rounds over bad lines: {time.monotonic() - began_s:.0f} s, {lines.counts}")
        logs = [device.log for device in fleet.devices.values()]
        print(f"unreachable {sum(log.count('phase=unreachable') for log in logs)} times")
        assert fleet.admin.slices() == fleet.admin.slices(clean)
        assert [entry.results for entry in run.rounds] == [DEVICES] * ROUNDS
        assert lines.counts.lost > 0
        assert lines.counts.cut > 0
