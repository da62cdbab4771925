"""Buffered runs (FedBuff): the server steps as soon as so many results are in, and nobody waits for anybody.

A round is one such step. Devices get their next task while the round goes on, with the values of that moment, and a
result enters the round that is open when it comes, whichever its task is of. That is stored with the result, so a round
is a pure function of the database, as in runs whose rounds wait for their devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.rounds.memory_requirements import required_bytes
from coordinator.rounds.runs import Run
from coordinator.rounds.selection import SelectableDevice, draw_order
from coordinator.storage import result_rows, round_rows, slot_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.task_rows import TaskRow

#: Why tasks lapsed whose values are too old by now.
TOO_STALE = "too_stale"


def round_entered(connection: Connection, run: Run) -> int:
    """Number of the round that a result which comes now enters: the open one, or the next if that one is full."""
    open_round = round_rows.find_open(connection, run.run_id)
    if open_round is None or open_round.state == "aggregating":
        return run.next_round
    if result_rows.count_entered(connection, run.run_id, open_round.round) >= (run.config.buffer_size or 0):
        return run.next_round
    return open_round.round


def is_too_stale(connection: Connection, run: Run, task: TaskRow) -> bool:
    """Whether a task's values will be too old for the round that its result would enter."""
    steps = run.committed - task.committed_before
    open_round = round_rows.find_open(connection, run.run_id)
    if open_round is not None and round_entered(connection, run) != open_round.round:
        steps += 1  # that one is full, and will move the values first
    return steps > run.config.max_staleness


def lapse_stale(connection: Connection, run: Run, committed: int) -> None:
    """Let the tasks lapse whose results could not enter any round to come, after one was committed."""
    task_rows.lapse_older(connection, run.run_id, committed - run.config.max_staleness, TOO_STALE)


def is_over(connection: Connection, run: Run, number: int, deadline_s: float, now_s: float) -> bool:
    """Whether a round waits no longer: its buffer is full, or its time is over and there is nothing to wait for."""
    entered = result_rows.count_entered(connection, run.run_id, number)
    if entered >= (run.config.buffer_size or 0):
        return True
    return now_s >= deadline_s and (
        entered >= run.config.min_results or not task_rows.is_any_open(connection, run.run_id)
    )


def next_place(
    connection: Connection, run: Run, number: int, free: Sequence[SelectableDevice]
) -> tuple[int, SelectableDevice] | None:
    """Open one more place of a round for a device that is drawn for it; None if no free device can serve it.

    Slices are dealt as to the places of a round that asks ``devices_per_round``, one turn after the other.

    Args:
        connection: connection with a transaction under way.
        run: the run.
        number: number of the open round.
        free: devices that have no task.
    """
    slot = slot_rows.count(connection, run.run_id, number)
    turn = run.config.devices_per_round
    slices = replace(run, next_round=number).deal(turn)[slot % turn]
    needed = required_bytes(run.manifest, run.settings, slices)
    able = [device for device in free if needed <= device.cap_bytes]
    if not able:
        return None
    slot_rows.add(connection, run.run_id, number, slot, slices)
    return slot, draw_order(able, run.config.seed, number, slot)[0]
