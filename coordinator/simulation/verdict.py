"""How an arm ends: it finished, or it diverged at some round. Anything else that stops it is an error."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from coordinator.rounds.evaluation import INITIAL
from coordinator.rounds.runs import end_run
from coordinator.simulation.arm import Arm
from coordinator.storage import evaluation_rows, round_rows, run_rows, simulation_rows
from edge_runtime.errors import CoordinatorError
from edge_runtime.worker.jobs import EvaluateOutcome

#: A loss has run away when it is over this many times the initial one, or that of guessing if that is larger.
RUNAWAY = 10.0
#: Begins the reason of a run that this module stopped.
_DIVERGED = "diverged: "
#: Code of the event that tells of a result that the coordinator refused for its content.
RESULT_REFUSED = "result_refused"

Status = Literal["finished", "diverged", "failed"]


class Ending(Struct, frozen=True):
    """How an arm ended.

    Attributes:
        status: finished, diverged or failed.
        round: last round whose values were in use, for an arm that diverged; -1 is where the arm began.
        reason: reason why it diverged or failed; empty if it finished.
    """

    status: Status
    round: int | None = None
    reason: str = ""


def judge_evaluation(arm: Arm, round_number: int, outcome: EvaluateOutcome) -> Ending | None:
    """The end of an arm whose values have run away, by the evaluation that was just made; None if they have not."""
    loss = outcome.mean_loss
    if not math.isfinite(loss):
        return Ending("diverged", round_number, f"the evaluation loss is {loss}")
    with arm.stores.storage.reading() as connection:
        first = evaluation_rows.find_done(connection, arm.run_id, INITIAL)
        package = run_rows.get(connection, arm.run_id).package_sha256
    if first is None:
        return None
    guessing = math.log(max(1, len(arm.stores.manifest(package).labels)))
    limit = RUNAWAY * max(first.mean_loss, guessing)
    if loss <= limit:
        return None
    reason = f"the evaluation loss is {loss:.4g}, over {limit:.4g} (ten times where it began, or of guessing)"
    return Ending("diverged", round_number, reason)


def judge_run(arm: Arm, now_s: float) -> Ending | None:
    """How the run has ended; None if it goes on.

    Raises:
        CoordinatorError: the coordinator gave it up for a reason that is no divergence; the message gives it.
    """
    with arm.stores.storage.reading() as connection:
        run = run_rows.get(connection, arm.run_id)
        last = round_rows.last_committed(connection, arm.run_id)
        applied = simulation_rows.steps_applied(connection, arm.run_id, last)
        refused = simulation_rows.first_not_finite(connection, arm.run_id, code=RESULT_REFUSED, after=last)
    number = INITIAL if last is None else last
    if run.state == "failed":
        reason = run.reason
        if reason.startswith(_DIVERGED):
            return Ending("diverged", number, reason.removeprefix(_DIVERGED))
        if "overflowed" in reason:
            return Ending("diverged", number + 1, reason)
        if refused is not None:
            said = f"{reason}; results were refused: {refused.message}"
            return Ending("diverged", refused.round, said)
        raise CoordinatorError(reason)
    if last is not None and applied == 0:
        return stop(arm, Ending("diverged", number, "no step of the round could be applied"), now_s)
    return Ending("finished") if run.state == "finished" else None


def stop(arm: Arm, ending: Ending | None, now_s: float) -> Ending | None:
    """End the run in the database, so that it stays ended, and return the ending; without one nothing is done."""
    if ending is not None:
        with arm.stores.storage.transaction() as connection:
            end_run(connection, arm.run_id, "failed", _DIVERGED + ending.reason, now_s=now_s)
    return ending
