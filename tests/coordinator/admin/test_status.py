"""``edge-coordinator status``: one screen that says whether all is well, and what to do."""

from __future__ import annotations

import json

import pytest

from coordinator import cli
from tests.coordinator.conftest import World


def status(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Exit code and what is printed."""
    code = cli.main(["status", "--state", "s", *options])
    return code, capsys.readouterr().out


def test_a_fresh_coordinator_says_what_comes_first(asked: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Without devices and runs the next two commands are named; nothing fails."""
    code, text = status(capsys)
    assert code == 0
    assert "edge-coordinator token" in text
    assert "edge-coordinator run new" in text


def test_all_is_well_while_a_run_goes_on(asked: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Devices by state and the run's progress are told, and no cure."""
    devices = asked.fleet("ash", "birch", "cedar")
    run_id = asked.create_run(rounds=3)
    asked.work(devices)
    code, text = status(capsys)
    assert code == 0
    assert text.startswith("all is well\n")
    assert f"{run_id}: running, 1 of 3 rounds" in text
    assert "->" not in text


def test_a_silent_fleet_fails(asked: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Where half of the devices are silent the exit code says so, for scripts, and the JSON says of what."""
    asked.fleet("ash", "birch")
    asked.clock.now_s += 1e6
    code, text = status(capsys, "--json")
    assert code == 1
    lines = json.loads(text)
    (failed,) = [line for line in lines if line["level"] == "FAIL"]
    assert failed["about"] == "devices"
    assert "silent" in failed["found"]
    assert failed["cure"]


def test_a_paused_run_names_the_way_on(asked: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that lets a paused run go on is in the line, and does so."""
    asked.fleet("ash", "birch", "cedar")
    run_id = asked.create_run()
    asked.play()
    asked.admin("POST", f"/v1/admin/runs/{run_id}/pause")
    _, text = status(capsys)
    assert f"edge-coordinator run resume {run_id}" in text
    assert cli.main(["run", "resume", run_id, "--state", "s"]) == 0
    capsys.readouterr()
    assert "paused" not in status(capsys)[1]


def test_a_loop_that_ended_fails(asked: World, capsys: pytest.CaptureFixture[str]) -> None:
    """What keeps the coordinator from its work is the first line."""
    asked.app.state.app_state.ended_loops.append("rounds")
    code, text = status(capsys)
    assert code == 1
    assert text.splitlines()[1] == "FAIL  coordinator: the loop rounds has ended"
