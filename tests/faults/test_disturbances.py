"""Faults by the dozen, counted and printed: whatever is done, runs end in the bits of undisturbed ones.

EDGE_FAULTS sets how many of each kind; ``make test-faults`` makes 200 kills of the coordinator, of devices and of both,
and a tenth of that of what takes seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.small_fleet import SmallFleet, small_fleet, undisturbed, wait_for_end

FAULTS = int(os.environ.get("EDGE_FAULTS", "4"))
#: Kinds of faults, and how many of them for each kill.
KINDS: dict[str, tuple[Callable[[SmallFleet], None], float]] = {
    "coordinator": (SmallFleet.kill_coordinator, 1.0),
    "device": (SmallFleet.kill_device, 1.0),
    "both": (SmallFleet.kill_both, 1.0),
    "lock": (SmallFleet.hold_lock, 0.1),
    "descriptors": (SmallFleet.use_up_descriptors, 0.1),
}
#: Longest pause from one fault to the next.
PAUSE_S = 0.8


@pytest.mark.parametrize("kind", [*KINDS, "cuts"])
def test_runs_end_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Nothing is lost or counted twice, the daemon lives, and every run ends as if nothing had happened."""
    disturb, share = KINDS.get(kind, (None, 1.0))
    wanted = max(1, round(FAULTS * share))
    runs, done = 0, 0
    with small_fleet(tmp_path / "fleet", cut_share=0.15 if disturb is None else 0.0) as fleet:
        assert fleet.proxy is not None
        publisher_key = (fleet.folder / "publisher").read_text()
        while done < wanted:
            run_id = fleet.create_run(fleet.folder / "package", publisher_key, seed=runs)
            while disturb is not None and done < wanted:
                time.sleep(fleet.source.uniform(0.0, PAUSE_S))
                run = fleet.summary(run_id)
                if run is not None and run.state == "finished":
                    break
                disturb(fleet)
                done += 1
            run = wait_for_end(fleet, run_id)
            done = done if disturb is not None else fleet.proxy.cut
            committed = [entry for entry in run.rounds if entry.state == "committed"]
            assert [entry.results for entry in run.rounds] == [2] * len(committed) == [2] * 3
            assert fleet.admin.slices(run_id) == undisturbed(tmp_path / f"undisturbed-{runs}", seed=runs)
            runs += 1
        assert fleet.answers()
        log = (fleet.folder / "log").read_text()
    crashes = [line for line in log.splitlines() if "crashed method" in line or "loop_ended" in line]
    assert not crashes
    found = dict(fleet.faults) if disturb is not None else {"connections cut": done}
    print(f"{found}: {runs} runs in the same bits")
