"""Visits: rounds in which every device is asked once, for the sums of a head in closed form.

A visit takes as many rounds as it needs. A device that was late or failed is asked once more. The visit is over when
every device that is there has been asked; devices that come later are not waited for. Each of its rounds solves for the
head anew, so accuracy can be watched as sums come in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import msgspec

from coordinator.aggregation.closed_form import ClosedForm
from coordinator.events import record
from coordinator.rounds.runs import FIRST_VISIT, TRAINING, Run, end_run, reason_of_end
from coordinator.storage import checkpoint_rows, evaluation_rows, round_rows, run_rows, task_rows
from coordinator.storage.connection import Connection
from coordinator.storage.result_rows import CountedResult
from coordinator.storage.stores import Stores
from edge_runtime.figures import size
from edge_runtime.protocol.messages import Task
from edge_runtime.training.feature_sums import FeatureSums, decode_sums, form_of
from edge_runtime.training.projection import Projection
from edge_runtime.training.protected import decode_vector, layout_of, unflat_sums

log = logging.getLogger("coordinator")
MOST_LABELS_NAMED = 5


def sums_of(stores: Stores, run: Run, results: list[CountedResult]) -> Iterator[FeatureSums]:
    """What each of a round's results changes in the sums, one at a time in the order of their slots."""
    form = form_of(run.config, run.manifest)
    for result in results:
        change = FeatureSums.nothing(form.width, form.labels)
        task = msgspec.json.decode(result.task, type=Task)
        if task.noised:
            vector = decode_vector(
                stores.private_blobs.get(result.change_sha256), layout_of(task, run.manifest)
            )
            change = unflat_sums(form, vector)
        elif result.adds_sums:
            change = decode_sums(stores.private_blobs.get(result.change_sha256), form)
        for sha256 in result.removed:
            change = change.minus(decode_sums(stores.private_blobs.get(sha256), form))
        yield change


def projection_of(run: Run) -> Projection | None:
    """The random projection of the run's features that its sums are of; None if they are of the features."""
    form = form_of(run.config, run.manifest)
    return Projection(form.square, form.width, run.config.seed) if run.config.sums_projection else None


def commit_round(
    connection: Connection,
    run: Run,
    number: int,
    solved: ClosedForm,
    results: Sequence[CountedResult],
    *,
    values_sha256: str,
    state_sha256: str,
    now_s: float,
) -> None:
    """Store what a round of a visit came to, and tell what the head was solved from."""
    evaluation = run.config.evaluation
    round_rows.commit(connection, run.run_id, number, closed_s=now_s, gated=False)
    run_rows.commit_visit(connection, run.run_id, values_sha256=values_sha256, optimizer_sha256=state_sha256)
    checkpoint_rows.add(connection, run.run_id, number)
    if evaluation is not None and (run.rounds_done + 1) % evaluation.every_rounds == 0:
        evaluation_rows.add(connection, run.run_id, number, values_sha256)
    message = f"{describe(solved, run.manifest.labels)}; {_describe_results(results)}"
    record(connection, now_s, "head_solved", message, run_id=run.run_id, round_number=number)


def describe(solved: ClosedForm, labels: tuple[str, ...]) -> str:
    """What a head was solved from, for people."""
    parts = [f"head in closed form of {solved.rows} rows, ridge {solved.ridge:g}, error {solved.error:.3f}"]
    if solved.constant:
        parts.append(f"{solved.constant} features are the same in all rows and are left out")
    if solved.repeated:
        parts.append(f"{solved.repeated} features are others over again and share their weight")
    if solved.absent:
        named = ", ".join(labels[index][:40] for index in solved.absent[:MOST_LABELS_NAMED])
        more = f" and {len(solved.absent) - MOST_LABELS_NAMED} more" * (
            len(solved.absent) > MOST_LABELS_NAMED
        )
        parts.append(f"no device has rows of {named}{more}")
    return "; ".join(parts)


def _describe_results(results: Sequence[CountedResult]) -> str:
    """What came in a round of a visit, for people."""
    told = [
        f"{size(sum(result.change_bytes for result in results))} of sums came from {len(results)} devices"
    ]
    if again := sum(bool(result.removed) for result in results):
        told.append(f"of which {again} took off what they had handed in before")
    if same := sum(not result.adds_sums and not result.removed for result in results):
        told.append(f"of which {same} had nothing new")
    return ", ".join(told)


def end_visit_if_over(stores: Stores, run: Run, now_s: float) -> None:
    """Let a run go on once no device is left to ask: to its training, or to its end.

    A visit that nobody was asked in yet waits. One in which every device failed ends the run.
    """
    with stores.storage.reading() as connection:
        asked = task_rows.asked_in_phase(connection, run.run_id, run.phase)
        if not asked or round_rows.find_open(connection, run.run_id) is not None:
            return
    with stores.storage.transaction() as connection:
        if run_rows.get(connection, run.run_id).state != run.state:
            return  # the operator stopped the run meanwhile
        newest = round_rows.last_committed(connection, run.run_id, run.phase)
        if newest is None:
            reason = f"none of the {len(asked)} devices that were asked handed in sums; see their events"
            end_run(connection, run.run_id, "failed", reason, now_s=now_s)
        elif run.phase == FIRST_VISIT:
            run_rows.set_phase(connection, run.run_id, TRAINING)
        else:
            _finish(connection, run, newest, now_s=now_s)
    log.info("visit_over run=%s phase=%s devices=%d", run.run_id, run.phase, len(asked))


def _finish(connection: Connection, run: Run, newest: int, *, now_s: float) -> None:
    """End a run after its last visit; the head of the newest round is evaluated if it was not yet."""
    if run.config.evaluation is None:
        end_run(connection, run.run_id, "finished", reason_of_end(run.phase), now_s=now_s)
        return
    if not evaluation_rows.is_known(connection, run.run_id, newest):
        evaluation_rows.add(connection, run.run_id, newest, run.values_sha256)
    if evaluation_rows.has_pending(connection, run.run_id):
        run_rows.await_evaluation(connection, run.run_id)
    else:
        end_run(connection, run.run_id, "finished", reason_of_end(run.phase), now_s=now_s)
