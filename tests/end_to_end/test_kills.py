"""Processes die with SIGKILL at the worst moments; workers are frozen first, so that the moment is certain."""

from __future__ import annotations

import pytest


def test_a_device_that_dies_in_mid_task_is_replaced(start_fleet) -> None:
    """Agent and worker killed in mid-task: another device takes the place, and every round commits in full."""
    fleet = start_fleet(rounds=2, deadline_s=20, selection_timeout_s=5)
    dead, _ = fleet.freeze_a_worker()
    dead.program.kill()
    run = fleet.wait_until_finished()
    assert [entry.results for entry in run.rounds if entry.state == "committed"] == [2, 2]
    assert len(fleet.events(dead.name, "device_late")) == 1


@pytest.mark.parametrize("report", ["weights", "scalars"])
def test_a_coordinator_that_dies_in_mid_round_goes_on(undisturbed, start_fleet, report: str) -> None:
    """Killed in mid-round and started again, the coordinator ends the run with the very bytes of an undisturbed one.

    The undisturbed run's devices send weights; a coordinator that replays scalars comes to the same bytes.
    """
    fleet = start_fleet(report=report)
    fleet.wait("a committed round", lambda: fleet.run().rounds_committed)
    _, worker = fleet.freeze_a_worker()
    fleet.coordinator.kill(with_children=False)
    assert fleet.query("SELECT count(*) FROM tasks WHERE state = 'working'") != [(0,)]
    fleet.start_coordinator()
    worker.resume()
    run = fleet.wait_until_finished()
    assert [entry.results for entry in run.rounds] == [2, 2, 2]
    assert fleet.admin.slices() == undisturbed.slices


def test_a_worker_that_dies_costs_its_task_alone(start_fleet) -> None:
    """A worker killed from outside is an event with its reason; the agent lives on and serves the next round."""
    fleet = start_fleet(rounds=2, devices_per_round=3)
    device, worker = fleet.freeze_a_worker()
    worker.kill()
    run = fleet.wait_until_finished()
    (event,) = fleet.events(device.name, "task_failed")
    assert event.message.startswith("WorkerError: the worker was killed by SIGKILL")
    assert (run.rounds[event.round].failed, run.rounds[event.round].results) == (1, 2)
    assert device.program.process.poll() is None
    fleet.wait("the device's result", lambda: "status=counted" in device.log)


def test_a_result_outlives_agent_and_coordinator(undisturbed, start_fleet) -> None:
    """A result that was never sent goes out after both were killed and started again, and is counted once."""
    fleet = start_fleet()
    device, worker = fleet.freeze_a_worker()
    fleet.coordinator.kill()
    worker.resume()
    fleet.wait("a result that cannot be sent", device.pending.exists)
    device.program.kill()
    assert "result_delivered" not in device.log
    fleet.start_coordinator()
    device.program.start()
    fleet.wait_until_finished()
    fleet.wait("the acknowledgement", lambda: not device.pending.exists())
    first_turn = device.log.rpartition("phase=started")[2].partition("phase=task_received")[0]
    assert "phase=result_delivered" in first_turn
    assert fleet.query("SELECT count(*), count(DISTINCT task_id) FROM results") == [(6, 6)]
    assert fleet.admin.slices() == undisturbed.slices
