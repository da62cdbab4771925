"""How an arm ends: finished, or diverged and at which round. Anything else that stops it is an error."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from coordinator.rounds.evaluation import INITIAL
from coordinator.rounds.runs import end_run
from coordinator.simulation.arm import Arm
from edge_runtime.errors import CoordinatorError
from edge_runtime.worker.jobs import EvaluateOutcome

#: A loss above this many times the larger of the initial one and that of guessing has run away.
RUNAWAY = 10.0
#: Begins the reason of a run that this module stopped.
_DIVERGED = "diverged: "
#: Event of a result that the coordinator refused for its content.
RESULT_REFUSED = "result_refused"

Status = Literal["finished", "diverged", "failed"]


class Ending(Struct, frozen=True):
    """How an arm ended; ``round`` is the last one whose values were in use, -1 before the first."""

    status: Status
    round: int | None = None
    reason: str = ""


def judge_evaluation(arm: Arm, round_number: int, outcome: EvaluateOutcome) -> Ending | None:
    """Whether values that were just evaluated have run away."""
    loss = outcome.mean_loss
    if not math.isfinite(loss):
        return Ending("diverged", round_number, f"the evaluation loss is {loss}")
    with arm.stores.storage.reading() as connection:
        first = connection.execute(
            "SELECT mean_loss FROM evaluations WHERE round = ? AND state = 'done'", (INITIAL,)
        ).fetchone()
        package = connection.execute("SELECT package_sha256 FROM runs").fetchone()[0]
    if first is None:
        return None
    guessing = math.log(max(1, len(arm.stores.manifest(package).labels)))
    limit = RUNAWAY * max(first["mean_loss"], guessing)
    if loss <= limit:
        return None
    reason = f"the evaluation loss is {loss:.4g}, over {limit:.4g} (ten times where it began, or of guessing)"
    return Ending("diverged", round_number, reason)


def judge_run(arm: Arm, now_s: float) -> Ending | None:
    """How the run has ended, or None if it goes on.

    Raises:
        CoordinatorError: the coordinator gave it up for a reason that is not divergence; the message is its own.
    """
    with arm.stores.storage.reading() as connection:
        run = connection.execute("SELECT state, reason FROM runs").fetchone()
        last = connection.execute("SELECT max(round) FROM rounds WHERE state = 'committed'").fetchone()[0]
        applied = connection.execute(
            "SELECT sum(steps_applied) FROM results JOIN tasks USING (task_id) WHERE run_id = ? AND round = ?",
            (arm.run_id, last),
        ).fetchone()[0]
        refused = connection.execute(
            "SELECT round, message FROM events WHERE run_id = ? AND code = ? AND round > coalesce(?, -1)"
            " AND message LIKE '%not finite%' ORDER BY event_id",
            (arm.run_id, RESULT_REFUSED, last),
        ).fetchone()
    number = INITIAL if last is None else int(last)
    if run["state"] == "failed":
        reason = str(run["reason"])
        if reason.startswith(_DIVERGED):
            return Ending("diverged", number, reason.removeprefix(_DIVERGED))
        if "overflowed" in reason:
            return Ending("diverged", number + 1, reason)
        if refused is not None:
            return Ending(
                "diverged", refused["round"], f"{reason}; results were refused: {refused['message']}"
            )
        raise CoordinatorError(reason)
    if last is not None and applied == 0:
        return stop(arm, Ending("diverged", number, "no step of the round could be applied"), now_s)
    return Ending("finished") if run["state"] == "finished" else None


def stop(arm: Arm, ending: Ending | None, now_s: float) -> Ending | None:
    """End the run in the database, so that it stays ended whoever looks next."""
    if ending is not None:
        with arm.stores.storage.transaction() as connection:
            end_run(connection, arm.run_id, "failed", _DIVERGED + ending.reason, now_s=now_s)
    return ending
