"""Training that stops where it does not pay: ``patience`` evaluations without a better one, and the best values stand.

After a first visit the head in closed form is the score to beat, so a run whose slices add nothing to it ends soon, and
says so.
"""

from __future__ import annotations

import logging

from coordinator.rounds.runs import FIRST_VISIT, LAST_VISIT, TRAINING, Run, end_run
from coordinator.storage import evaluation_rows, round_rows, run_rows
from coordinator.storage.evaluation_rows import Scores
from coordinator.storage.stores import Stores

log = logging.getLogger("coordinator")


def stop_without_gain(stores: Stores, run: Run, now_s: float) -> bool:
    """Stop the training of a run if its last evaluations were no better than an earlier one; returns whether it did.

    The values of the best evaluation stand. A visit that was to follow is made with them, unless they come from a
    visit: then their head is solved already.
    """
    if not run.config.patience or run.phase != TRAINING:
        return False
    # Nearly every pass finds nothing to stop, and only looks. What it finds stays so: evaluations come one at a time,
    # and rounds are opened and committed by this loop alone.
    with stores.storage.reading() as connection:
        if round_rows.find_open(connection, run.run_id) is not None:
            return False
        scores = evaluation_rows.done(connection, run.run_id)
    best = best_of(scores, run.manifest.task == "causal_lm")
    if best is None or len(scores) - 1 - scores.index(best) < run.config.patience:
        return False
    with stores.storage.transaction() as connection:
        if run_rows.get(connection, run.run_id).state != run.state:
            return False  # the operator stopped the run meanwhile
        values_sha256 = evaluation_rows.values_of(connection, run.run_id, best.round)
        run_rows.set_values(connection, run.run_id, values_sha256)
        phases = {entry.round: entry.phase for entry in round_rows.all_rounds(connection, run.run_id)}
        visited = phases.get(best.round) == FIRST_VISIT
        if run.config.head == "closed_form" and run.config.visit != "first" and not visited:
            run_rows.set_phase(connection, run.run_id, LAST_VISIT)
        else:
            end_run(connection, run.run_id, "finished", _reason(run, scores, best, visited), now_s=now_s)
    log.info("training_stopped run=%s best_round=%d", run.run_id, best.round)
    return True


def best_of(scores: list[Scores], by_loss: bool) -> Scores | None:
    """The best evaluation, the earliest of equals: by accuracy, or by loss for a language model."""
    if not scores:
        return None
    return min(scores, key=lambda each: each.mean_loss if by_loss else -each.accuracy)


def _reason(run: Run, scores: list[Scores], best: Scores, visited: bool) -> str:
    """Why the run ended, for people."""
    by_loss = run.manifest.task == "causal_lm"
    best_score, last_score = (
        f"loss {each.mean_loss:.4f}" if by_loss else f"{each.accuracy:.1%}" for each in (best, scores[-1])
    )
    where = "the values it began with" if best.round < 0 else f"round {best.round + 1}"
    if visited:
        return (
            f"slices add nothing to the head in closed form: {best_score} after the visit, {last_score} at the last of "
            f"{run.config.patience} evaluations without a better one; the visit's values stand"
        )
    return (
        f"{run.config.patience} evaluations without a better one: {best_score} at {where}, {last_score} at the last; "
        "the best values stand"
    )
