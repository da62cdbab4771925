"""A run's rounds: selecting → collecting → aggregating → committed | abandoned.

Nothing is kept in memory between two passes. Each numbered step of :func:`play` looks into the database and makes its
transition in one transaction, so a coordinator that was killed at any moment goes on where it stood.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np

from coordinator.aggregation.closed_form import visit_update
from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import server_update
from coordinator.events import record
from coordinator.rounds.buffered import is_over, lapse_stale, next_place
from coordinator.rounds.contributions import Contributions
from coordinator.rounds.early_stop import stop_without_gain
from coordinator.rounds.evaluation import INITIAL
from coordinator.rounds.masked_rounds import MaskedSum, RoundLostError, advance, masked_mean, masked_sums
from coordinator.rounds.masked_rounds import close as close_masked
from coordinator.rounds.memory_requirements import required_bytes
from coordinator.rounds.presence import SLACK_S, askable, order_of_asking, patience_s
from coordinator.rounds.private_rounds import adds_noise, noised, noised_sums, possible, spent
from coordinator.rounds.releases import note_commit
from coordinator.rounds.results import TIMED_OUT
from coordinator.rounds.rollback import MOST_STATES
from coordinator.rounds.runs import (
    LAST_VISIT,
    Run,
    active_runs,
    config_of,
    end_run,
    find_run,
    reason_of_end,
    starts_now,
)
from coordinator.rounds.selection import SelectableDevice, fit, substitute
from coordinator.rounds.sharing import share_of
from coordinator.rounds.tasks import MISSED_SIGNS, reserve
from coordinator.rounds.visits import commit_round, end_visit_if_over, projection_of, sums_of
from coordinator.storage import (
    checkpoint_rows,
    device_rows,
    evaluation_rows,
    masking_rows,
    privacy_rows,
    result_rows,
    round_rows,
    run_rows,
    set_aside_rows,
    slot_rows,
    task_rows,
)
from coordinator.storage.connection import Connection
from coordinator.storage.device_rows import SeenDevice
from coordinator.storage.result_rows import CountedResult
from coordinator.storage.round_rows import RoundRow
from coordinator.storage.stores import Stores
from edge_runtime.errors import EdgeError, PackageError, SliceError
from edge_runtime.package.slices import Values, decode_values, encode_values

log = logging.getLogger("coordinator")

#: Is told a run's id, a round's number, and how many seconds its aggregation took.
NoteAggregation = Callable[[str, int, float], None]

#: Time after a start in which devices may come back that were live before, at least and at most.
LEAST_RETURN_S = 30.0
MOST_RETURN_S = 900.0

#: Why a task lapsed, by the state it was in when its time ran out.
OVERDUE = {"reserved": "silent", "working": "late"}
#: Why one lapsed whose device gave signs of life, and then none any more.
LOST = "lost"


def play(stores: Stores, now_s: float, note_aggregation: NoteAggregation = lambda *_: None) -> None:
    """One pass over the active runs; it may be repeated at any time.

    Args:
        stores: handles on the state folder.
        now_s: the present moment, in seconds since 1970.
        note_aggregation: is told how long the aggregation of a round took.
    """
    # The next runs in the queue start when they need not wait for another.
    _start_runs(stores, now_s)
    with stores.storage.reading() as connection:
        training = run_rows.in_turn(connection)
    for run_id in training:
        _play_run(stores, run_id, now_s, note_aggregation)


def _play_run(stores: Stores, run_id: str, now_s: float, note_aggregation: NoteAggregation) -> None:
    try:
        # 1. The run as it stands.
        with stores.storage.reading() as connection:
            run = find_run(stores, connection, run_id)
        # 2. A round opens: devices are drawn, slices dealt, slots reserved. A visit to all devices may be over instead,
        #    or training that no longer gains anything.
        if stop_without_gain(stores, run, now_s):
            return
        _open_round(stores, run, now_s)
        # 3. Slots whose device fell out go to the next one.
        _fill_slots(stores, run, now_s)
        # 4. With all results in, or the time over, the round closes: to be aggregated, or abandoned.
        _close_round(stores, run, now_s)
        # 5. The mean delta moves the global values, and the round is committed.
        number = _closed_round(stores, run)
        if number is not None:
            begun = perf_counter()
            _aggregate_round(stores, run, number, now_s)
            if _closed_round(stores, run) is None:  # else it waits for what devices reveal
                note_aggregation(run_id, number, perf_counter() - begun)
    except EdgeError as error:
        # A blob is gone or damaged, or its package contradicts itself. Other runs can go on.
        with stores.storage.transaction() as connection:
            end_run(connection, run_id, "failed", str(error), now_s=now_s)


def resume(stores: Stores, now_s: float) -> None:
    """Called once after a start, so that the time in which no coordinator ran counts against nobody."""
    with stores.storage.transaction() as connection:
        last_seen_s = device_rows.last_check_in_s(connection)
        if last_seen_s is not None and last_seen_s > now_s:  # the machine's clock was set back meanwhile
            back_s = last_seen_s - now_s
            device_rows.move_check_ins(connection, -back_s)
            round_rows.move_open(connection, -back_s)
            message = (
                f"this machine's clock was set back by {back_s:.0f} s or more; deadlines were moved with it"
            )
            record(connection, now_s, "clock_set", message)
        elif last_seen_s is not None and last_seen_s < now_s:
            down_s = now_s - last_seen_s
            device_rows.move_check_ins(connection, down_s)
            # Devices that found nobody ask again after pauses that grew with the time they tried.
            back_s = now_s + min(max(LEAST_RETURN_S, down_s), MOST_RETURN_S)
            device_rows.expect_live(connection, since_s=now_s - SLACK_S, by_s=back_s)
        for run in active_runs(stores, connection):
            grace_s = now_s + run.config.selection_s
            alive_by_s = now_s + MISSED_SIGNS * run.config.alive_every_s
            task_rows.extend_open(connection, run.run_id, grace_s, alive_by_s=alive_by_s)
            round_rows.extend_deadline(connection, run.run_id, grace_s)
            masking_rows.extend(connection, run.run_id, grace_s)
            log.info("resumed run=%s next_round=%d committed=%d", run.run_id, run.next_round, run.committed)


def _start_runs(stores: Stores, now_s: float) -> None:
    while True:
        with stores.storage.reading() as connection:
            queued = run_rows.first_queued(connection)
            if queued is None or not starts_now(connection, queued):
                return
        with stores.storage.transaction() as connection:
            run_rows.start(connection, queued.run_id, started_s=now_s)
            if config_of(queued.config).evaluation is not None:
                evaluation_rows.add(connection, queued.run_id, INITIAL, queued.values_sha256)


def _open_round(stores: Stores, run: Run, now_s: float) -> None:
    if run.paused:
        return
    with stores.storage.reading() as connection:
        if round_rows.find_open(connection, run.run_id) is not None:
            return
        devices = _able(run, askable(connection, run, now_s))
        share = share_of(stores, connection, run, now_s)
        elsewhere = task_rows.held_elsewhere(connection, run.run_id)
        at_work = task_rows.holders(connection, run.run_id)
    if run.next_round == 0 and len(devices) < run.config.min_devices:
        return
    if run.visiting and not devices:
        end_visit_if_over(stores, run, now_s)
        return
    free = [device for device in devices if device.device_id not in elsewhere | at_work]
    if share is not None and not at_work and len(free) < min(share, len(devices)):
        return  # others have more than their share, or it is their turn; their rounds have an end
    order = order_of_asking(free, run.config.seed, run.next_round, now_s)
    dealt, chosen = _seat(run, order, share)
    if run.is_buffered and (chosen or at_work):
        dealt, chosen = [], {}  # places are opened one by one
    elif len(chosen) < run.least_results:
        _fail_if_hopeless(stores, run, now_s)
        return
    until_s = _places_wait(free, run, now_s)
    with stores.storage.transaction() as connection:
        number = run.next_round
        run_rows.set_next_round(connection, run.run_id, number + 1)
        round_rows.add(
            connection,
            run.run_id,
            number,
            opened_s=now_s,
            deadline_s=now_s + run.config.selection_s + run.config.deadline_s,
            values_sha256=run.values_sha256,
            phase=run.phase,
        )
        for slot, slices in enumerate(dealt):
            slot_rows.add(connection, run.run_id, number, slot, slices)
        for slot, device in chosen.items():
            reserve(
                connection,
                run,
                number,
                slot,
                device.device_id,
                now_s=now_s,
                until_s=until_s[device.device_id],
            )
    log.info("round_opened run=%s round=%d places=%d", run.run_id, number, len(dealt))


def _fill_slots(stores: Stores, run: Run, now_s: float) -> None:
    with stores.storage.transaction() as connection:
        open_round = round_rows.find_open(connection, run.run_id)
        if open_round is None or open_round.state == "aggregating":
            return
        number = open_round.round
        # 1. Time runs out for the silent and the late.
        for task in task_rows.overdue(connection, run.run_id, now_s=now_s):
            reason = OVERDUE[task.state] if task.due_s < now_s else LOST
            task_rows.lapse(connection, task.task_id, reason)
            record(
                connection,
                now_s,
                f"device_{reason}",
                f"place {task.slot} goes to another device",
                run_id=run.run_id,
                round_number=task.round,
                device=task.device_name,
                task_id=task.task_id,
            )
        if run.is_buffered:
            round_rows.set_state(connection, run.run_id, number, "collecting")
            if not run.paused and now_s < open_round.deadline_s:
                _keep_busy(stores, connection, run, number, now_s)
            return
        # 2. Vacant slots are offered on, unless the time is over and enough results are in.
        vacant = slot_rows.vacant(connection, run.run_id, number)
        counted = task_rows.count(connection, run.run_id, number, "counted")
        if vacant and not run.paused and (now_s < open_round.deadline_s or counted < run.least_results):
            _offer_on(connection, run, number, vacant, now_s)
        # 3. Once nobody is left to check in, the round only collects.
        reserved = task_rows.count(connection, run.run_id, number, "reserved")
        if open_round.state == "selecting" and reserved == 0:
            round_rows.set_state(connection, run.run_id, number, "collecting")


def _close_round(stores: Stores, run: Run, now_s: float) -> None:
    with stores.storage.transaction() as connection:
        open_round = round_rows.find_open(connection, run.run_id)
        if open_round is None or open_round.state == "aggregating":
            return
        number = open_round.round
        if run.is_buffered:
            _close_buffered(connection, run, open_round, now_s)
            return
        counted = task_rows.count(connection, run.run_id, number, "counted")
        enough = counted >= run.least_results
        full = run.config.enough_results is not None and counted >= run.config.enough_results
        nobody_left = not task_rows.has_open(connection, run.run_id, number) and not (
            run.config.late_grace_s
            and task_rows.may_come_late(
                connection, run.run_id, number, due_after_s=now_s - run.config.late_grace_s, reasons=TIMED_OUT
            )
        )
        if not nobody_left and not full and not (enough and now_s >= open_round.deadline_s):
            return
        if not enough and now_s < open_round.deadline_s and _may_come_free(connection, run, number, now_s):
            return
        if enough:
            task_rows.lapse_open_of_round(connection, run.run_id, number)
            round_rows.set_state(connection, run.run_id, number, "aggregating")
        else:
            reason = f"{counted} results of at least {run.least_results}, and no device left to ask"
            _abandon(connection, run, number, reason, now_s)


def _close_buffered(connection: Connection, run: Run, open_round: RoundRow, now_s: float) -> None:
    number = open_round.round
    if not is_over(connection, run, number, open_round.deadline_s, now_s):
        return
    entered = result_rows.count_entered(connection, run.run_id, number)
    if entered >= run.config.min_results:
        round_rows.set_state(connection, run.run_id, number, "aggregating")
    else:
        reason = f"{entered} results of at least {run.config.min_results} in time, and no device at work"
        _abandon(connection, run, number, reason, now_s)


def _keep_busy(stores: Stores, connection: Connection, run: Run, number: int, now_s: float) -> None:
    """Give devices of a buffered run that have no task places of the open round, as many as may be at work."""
    share = share_of(stores, connection, run, now_s)
    holders = task_rows.holders(connection, run.run_id)
    wanted = run.config.devices_per_round if share is None else min(run.config.devices_per_round, share)
    busy = holders | task_rows.held_elsewhere(connection, run.run_id)
    there = askable(connection, run, now_s)
    until_s = _places_wait(there, run, now_s)
    free = [
        device
        for device in order_of_asking(there, run.config.seed, number, now_s)
        if device.device_id not in busy
    ]
    for _ in range(wanted - len(holders)):
        place = next_place(connection, run, number, free)
        if place is None:
            return
        slot, device = place
        due_s = until_s[device.device_id]
        reserve(connection, run, number, slot, device.device_id, now_s=now_s, until_s=due_s)
        free.remove(device)


def _closed_round(stores: Stores, run: Run) -> int | None:
    """Number of the round that waits to be aggregated, if one does."""
    with stores.storage.reading() as connection:
        open_round = round_rows.find_open(connection, run.run_id)
    return open_round.round if open_round is not None and open_round.state == "aggregating" else None


def _aggregate_round(stores: Stores, run: Run, number: int, now_s: float) -> None:
    with stores.storage.reading() as connection:
        results = result_rows.counted(connection, run.run_id, number)
        begun = round_rows.last_committed(connection, run.run_id, run.phase) is not None
    masked = None
    if run.config.secure_aggregation:
        try:
            masked = advance(stores, run, number, results, now_s)
        except RoundLostError as error:
            _lose(stores, run, number, None, str(error), now_s)
            return
        if masked is None:
            return
    # 1. What the devices contributed, one at a time in the order of their slots, moves the values.
    values = decode_values(stores.blobs.get(run.values_sha256), run.manifest.slices)
    state = ServerState()
    if run.optimizer_sha256 is not None:
        state = ServerState.decode(stores.private_blobs.get(run.optimizer_sha256))
    if run.visiting:
        if not begun and run.config.continue_from is None:
            state = replace(state, sums=None)  # of an earlier visit, behind which nothing was trained
        _solve_round(stores, run, number, values, state, results, now_s, masked)
        return
    _train_round(stores, run, number, values, state, results, now_s, masked)


def _train_round(
    stores: Stores,
    run: Run,
    number: int,
    values: Values,
    state: ServerState,
    results: list[CountedResult],
    now_s: float,
    masked: MaskedSum | None,
) -> None:
    """Move the values by what a round's devices contributed, and commit the round."""
    contributions = Contributions(stores, run, values, [] if masked is not None else results)
    if masked is None and len(contributions.admitted) < run.config.min_results:
        reason = f"{len(contributions.admitted)} results of at least {run.config.min_results} can be used"
        reason = f"{reason}; left out: {contributions.words()}"
        _lose(stores, run, number, contributions, reason, now_s)
        return
    try:
        moves = _moves(stores, run, number, contributions, masked, values)
    except SliceError as error:  # of scalars that replay to no finite change
        _lose(stores, run, number, contributions, str(error), now_s)
        return
    update = server_update(
        values,
        state,
        moves,
        config=run.config,
        specs=run.manifest.slices,
        round_number=number,
        committed=run.committed,
    )
    if not all(
        np.isfinite(array).all() for array in [*update.values.values(), *(update.reference or {}).values()]
    ):
        _lose(stores, run, number, contributions, "the averaged change overflowed", now_s)
        return
    # 2. Bytes first, then the one transaction that makes them count.
    committed = Committed(
        values=stores.blobs.put(encode_values(update.values, run.manifest)),
        state=stores.private_blobs.put(update.state.encode()),
        average=(
            None if update.average is None else stores.blobs.put(encode_values(update.average, run.manifest))
        ),
        reference=None if update.reference is None else stores.blobs.put(encode_values(update.reference)),
        gated_variance=update.gated_variance,
        flat=update.flat,
    )
    spent_now = spent(stores, run, number)
    with stores.storage.transaction() as connection:
        if round_rows.find_open(connection, run.run_id) is None:
            return  # the operator stopped the run meanwhile
        privacy_rows.add(connection, spent_now)
        close_masked(stores, connection, run)
        contributions.note(connection, number, now_s=now_s)
        run_rows.set_delta_sizes(connection, run.run_id, contributions.sizes)
        _commit(connection, run, number, committed, now_s=now_s)
    # 3. What only this round needed can go.
    _discard(stores, run, results, committed.state)
    log.info("round_committed run=%s round=%d results=%d", run.run_id, number, len(results))


def _moves(
    stores: Stores,
    run: Run,
    number: int,
    contributions: Contributions,
    masked: MaskedSum | None,
    values: Values,
) -> Iterable[Contribution]:
    """What moves the values: contributions, one at a time; or their mean, where no single one is to be seen in it.

    Raises:
        SliceError: masked scalars replay to no finite change.
    """
    if masked is not None:
        return [masked_mean(stores, run, number, masked, values)]
    if adds_noise(run.config):
        return [noised(run, number, contributions, values)]
    return contributions


def _lose(
    stores: Stores, run: Run, number: int, contributions: Contributions | None, reason: str, now_s: float
) -> None:
    """Abandon a round of which no value can come."""
    with stores.storage.transaction() as connection:
        if contributions is not None:
            contributions.note(connection, number, now_s=now_s)
        close_masked(stores, connection, run)
        _abandon(connection, run, number, reason, now_s)


def _solve_round(
    stores: Stores,
    run: Run,
    number: int,
    values: Values,
    state: ServerState,
    results: list[CountedResult],
    now_s: float,
    masked: MaskedSum | None,
) -> None:
    """Solve for the head from the sums of a visit so far and those of a round, and commit the round."""
    try:
        each = sums_of(stores, run, results) if masked is None else [masked_sums(run, number, masked)]
        visited = visit_update(
            values,
            state,
            each if masked is not None or not adds_noise(run.config) else [noised_sums(run, number, each)],
            head=run.head_name,
            ridge=run.config.ridge,
            projection=projection_of(run),
            possible=partial(possible, run),
        )
    except SliceError as error:
        names = ", ".join(result.device_name for result in results)
        reason = f"with what {names} handed in, {error}; none of it is kept"
        _lose(stores, run, number, None, reason, now_s)
        return
    if visited is None:
        raise PackageError(f"run {run.run_id} visits devices, and round {number} has no sums")
    update, solved = visited
    values_sha256 = stores.blobs.put(encode_values(update.values, run.manifest))
    state_sha256 = stores.private_blobs.put(update.state.encode())
    spent_now = spent(stores, run, number)
    with stores.storage.transaction() as connection:
        if round_rows.find_open(connection, run.run_id) is None:
            return  # the operator stopped the run meanwhile
        privacy_rows.add(connection, spent_now)
        close_masked(stores, connection, run)
        commit_round(
            connection,
            run,
            number,
            solved,
            results,
            values_sha256=values_sha256,
            state_sha256=state_sha256,
            now_s=now_s,
        )
    _discard(stores, run, results, state_sha256)
    log.info("round_committed run=%s round=%d results=%d", run.run_id, number, len(results))


def _discard(stores: Stores, run: Run, results: list[CountedResult], state_sha256: str) -> None:
    """Remove what only a committed round needed, and the server state that the run cannot go back to any more."""
    outdated = {sha256 for result in results for sha256 in (result.change_sha256, *result.removed)}
    with stores.storage.reading() as connection:
        kept = checkpoint_rows.states(connection, run.run_id, most=MOST_STATES + 1)
        # Another run may have the same state: one that goes on from an earlier one begins with it.
        gone = [state for state in kept[MOST_STATES:] if not run_rows.has_state(connection, state)]
    outdated |= set(gone) - set(kept[:MOST_STATES])
    for sha256 in outdated - {state_sha256}:
        stores.private_blobs.discard(sha256)


@dataclass(frozen=True)
class Committed:
    """A round's :class:`coordinator.aggregation.server_step.ServerUpdate` once its parts are stored.

    Attributes:
        values: digest of the slice values.
        state: digest of the server state.
        average: digest of the mean of the values; None while there is none.
        reference: digest of what directions are compared with; None if they are not.
        gated_variance: variance for which the gate held everything back; None if it did not.
        flat: whether devices found the loss flat along the last step, so that a rate that sets itself stayed.
    """

    values: str
    state: str
    average: str | None
    reference: str | None
    gated_variance: float | None
    flat: bool = False


def _commit(connection: Connection, run: Run, number: int, committed: Committed, *, now_s: float) -> None:
    count = run.committed + 1
    last = count == run.config.rounds
    evaluation = run.config.evaluation
    gated = committed.gated_variance is not None
    round_rows.commit(connection, run.run_id, number, closed_s=now_s, gated=gated)
    if committed.gated_variance is not None:
        message = (
            f"variance {committed.gated_variance:.3g} between the halves exceeds gate_variance = "
            f"{run.config.gate_variance:g}; the values stay, the next round adds to what came in"
        )
        record(connection, now_s, "round_gated", message, run_id=run.run_id, round_number=number)
    if committed.flat:
        message = 'the loss is flat along the last step, so rate = "auto" stays as it was; the slices may move nothing'
        record(connection, now_s, "loss_flat", message, run_id=run.run_id, round_number=number)
    run_rows.commit(
        connection,
        run.run_id,
        values_sha256=committed.values,
        optimizer_sha256=committed.state,
        average_sha256=committed.average,
        reference_sha256=committed.reference,
        committed=count,
    )
    note_commit(connection, run.run_id, number, committed.average or committed.values, now_s=now_s)
    if evaluation is not None and (last or (run.rounds_done + 1) % evaluation.every_rounds == 0):
        evaluation_rows.add(connection, run.run_id, number, committed.average or committed.values)
    visits_last = run.config.head == "closed_form" and run.config.visit != "first"
    if last and visits_last:
        run_rows.set_phase(connection, run.run_id, LAST_VISIT)
    checkpoint_rows.add(connection, run.run_id, number)
    if run.is_buffered:
        lapse_stale(connection, run, count)
    if last:  # in a buffered run devices are still at work
        task_rows.lapse_open_of_run(connection, run.run_id)
    if not last or visits_last:
        return
    if evaluation is not None:
        run_rows.await_evaluation(connection, run.run_id)
    else:
        end_run(connection, run.run_id, "finished", reason_of_end(run.phase), now_s=now_s)


def _abandon(connection: Connection, run: Run, number: int, reason: str, now_s: float) -> None:
    # A visit asks a lost device only once more and so ends of itself: a round without results ends nothing.
    in_a_row = 0 if run.visiting else run.abandoned_in_a_row + 1
    round_rows.abandon(connection, run.run_id, number, reason=reason, closed_s=now_s)
    run_rows.set_abandoned_in_a_row(connection, run.run_id, in_a_row)
    record(connection, now_s, "round_abandoned", reason, run_id=run.run_id, round_number=number)
    if in_a_row >= run.config.max_abandoned:
        end_run(
            connection,
            run.run_id,
            "failed",
            f"{in_a_row} rounds abandoned in a row; the last: {reason}",
            now_s=now_s,
        )


def _fail_if_hopeless(stores: Stores, run: Run, now_s: float) -> None:
    """End a run that waits for devices which it has set aside: those that are left of its own can never be enough."""
    with stores.storage.transaction() as connection:
        aside = set_aside_rows.of_run(connection, run.run_id)
        started_s = run_rows.get(connection, run.run_id).started_s or 0.0
        left = [d for d in device_rows.not_set_aside(connection, run.run_id) if d.seen_s >= started_s]
        if not aside or len(left) >= run.least_results:
            return
        names = ", ".join(row.device_name for row in aside)
        last = max(aside, key=lambda row: row.at_s)
        reason = (
            f"{len(left)} devices are left of at least {run.least_results}; set aside: {names}; "
            f"the last, {last.device_name}, for: {last.reason}"
        )
        end_run(connection, run.run_id, "failed", reason, now_s=now_s)


def _places_wait(devices: list[SeenDevice], run: Run, now_s: float) -> dict[str, float]:
    """Until when a place waits for each device, by id."""
    selection_s = run.config.selection_s
    return {device.device_id: now_s + patience_s(device, selection_s, now_s) for device in devices}


def _seat(
    run: Run, order: list[SelectableDevice], share: int | None
) -> tuple[list[tuple[str, ...]], dict[int, SelectableDevice]]:
    """Deal slices to as many slots as can be served, and choose their devices; fewer slots mean more slices each."""
    count = min(run.config.devices_per_round, len(order), len(order) if share is None else share)
    while count > 0:
        dealt = run.deal(count)
        chosen = fit(order, count, _requirement(run, dealt))
        if len(chosen) == count:
            return dealt, chosen
        count = len(chosen)
    return [], {}


def _offer_on(connection: Connection, run: Run, number: int, vacant: list[int], now_s: float) -> None:
    elsewhere = task_rows.held_elsewhere(connection, run.run_id)
    devices = [
        device for device in _able(run, askable(connection, run, now_s)) if device.device_id not in elsewhere
    ]
    order = order_of_asking(devices, run.config.seed, number, now_s)
    until_s = _places_wait(devices, run, now_s)
    tasks = task_rows.of_round(connection, run.run_id, number)
    dealt = slot_rows.dealt(connection, run.run_id, number)
    busy = {task.device_id for task in tasks if task.state != "lapsed"}
    failed = {task.device_id for task in tasks if task.state == "lapsed"}
    for slot in vacant:
        device = substitute(
            order,
            slot,
            busy=busy,
            had_slot={task.device_id for task in tasks if task.slot == slot},
            failed=failed,
            required_bytes=_requirement(run, dealt),
        )
        if device is not None:
            reserve(
                connection,
                run,
                number,
                slot,
                device.device_id,
                now_s=now_s,
                until_s=until_s[device.device_id],
            )
            busy.add(device.device_id)


def _may_come_free(connection: Connection, run: Run, number: int, now_s: float) -> bool:
    """Whether a device that works for another run could still be asked for a place of a round."""
    elsewhere = task_rows.held_elsewhere(connection, run.run_id)
    if not elsewhere:
        return False
    asked = {task.device_id for task in task_rows.of_round(connection, run.run_id, number)}
    return any(
        device.device_id in elsewhere - asked for device in _able(run, askable(connection, run, now_s))
    )


def _requirement(run: Run, dealt: list[tuple[str, ...]]) -> Callable[[int], int]:
    """A function that predicts the peak of a slot's task; each distinct question is worked out once."""
    settings = run.settings
    known = {slices: required_bytes(run.manifest, settings, slices) for slices in set(dealt)}
    return lambda slot: known[dealt[slot]]


def _able(run: Run, devices: list[SeenDevice]) -> list[SeenDevice]:
    """Devices whose cap admits what they would do: in a visit that depends on the rows that each has."""
    if not run.visiting:
        return devices
    needed = partial(required_bytes, run.manifest, run.settings, (run.head_name,))
    return [device for device in devices if needed(rows=device.example_count) <= device.cap_bytes]
