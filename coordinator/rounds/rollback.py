"""Going back: a run stands again where it stood after one of its committed rounds.

What came later stays in the history and counts no more: not for the values, the server's state, the number of rounds,
the evaluations by which training stops, or the devices that a visit has asked. Rounds go on with new numbers, so they
draw new directions and devices.
"""

from __future__ import annotations

from coordinator.events import record
from coordinator.refusals import ConflictError, NotFoundError
from coordinator.rounds.runs import ACTIVE, Run, find_run
from coordinator.storage import (
    checkpoint_rows,
    evaluation_rows,
    masking_rows,
    result_rows,
    round_rows,
    task_rows,
)
from coordinator.storage.connection import Connection
from coordinator.storage.stores import Stores

#: Committed rounds whose server state is kept: with moments it takes four times the space of the values.
MOST_STATES = 20
#: Why tasks lapsed whose round was taken back.
ROLLED_BACK = "rolled_back"


def roll_back(
    stores: Stores, connection: Connection, run_id: str, to: int, *, now_s: float
) -> tuple[Run, int]:
    """Let a run go back to where it stood after a round, at the operator's word.

    Asking for what is so already changes nothing.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        run_id: id of the run, or ``latest``.
        to: number of a committed round.
        now_s: the present moment.

    Returns:
        the run as it was before, and how many rounds count no more.

    Raises:
        NotFoundError: ``unknown_run``; ``unknown_round``, it cannot go back there.
        ConflictError: ``run_ended``.
    """
    run = find_run(stores, connection, run_id)
    if run.state not in ACTIVE:
        way_out = (
            "it has not begun" if run.state == "queued" else "publish an earlier round as a release instead"
        )
        raise ConflictError("run_ended", f"run {run.run_id} is {run.state} and cannot go back; {way_out}")
    possible = checkpoint_rows.restorable(connection, run.run_id, most=MOST_STATES)
    if to not in possible:
        which = (
            f"to rounds {possible[0]} to {possible[-1]}"
            if possible
            else "nowhere: no round has committed yet"
        )
        raise NotFoundError(
            "unknown_round",
            f"run {run.run_id} cannot go back to round {to}: it has not committed it, or its server state is not kept "
            f"any more; it can go back {which}",
        )
    taken_back = round_rows.roll_back(connection, run.run_id, to, at_s=now_s)
    if not taken_back:
        return run, 0
    reason = f"rolled back to round {to} by the operator"
    task_rows.lapse_open_of_run(connection, run.run_id, ROLLED_BACK)
    masking_rows.forget(connection, run.run_id)
    round_rows.abandon_open(connection, run.run_id, reason=reason, closed_s=now_s)
    evaluation_rows.drop_pending(connection, run.run_id, after=to)
    result_rows.withdraw(connection, run.run_id, run.next_round)
    checkpoint_rows.restore(connection, run.run_id, to)
    record(
        connection,
        now_s,
        "run_rolled_back",
        f"to round {to}; {taken_back} later rounds count no more",
        run_id=run.run_id,
    )
    return run, taken_back
