"""What a device gets when it checks in, and how a slot of a round changes hands."""

from __future__ import annotations

from msgspec import structs

from coordinator.auth import Device
from coordinator.events import record
from coordinator.refusals import ConflictError, MalformedError, NotFoundError
from coordinator.rounds.memory_requirements import exits_for, rank_for, reached, required_bytes
from coordinator.rounds.protection import needs_protection, protection_of
from coordinator.rounds.releases import newest_for
from coordinator.rounds.results import find_task
from coordinator.rounds.runs import Run, active_runs, find_run
from coordinator.rounds.set_aside import note_failure, still_set_aside
from coordinator.storage import (
    device_rows,
    event_rows,
    protecting_rows,
    result_rows,
    round_rows,
    run_rows,
    slot_rows,
    task_rows,
)
from coordinator.storage.connection import Connection
from coordinator.storage.stores import Stores
from coordinator.storage.task_rows import TaskWithSlices
from edge_runtime.figures import size, whole_size
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.ranks import rank_of, with_rank
from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    PROTOCOL_VERSION,
    CheckInRequest,
    CheckInResponse,
    ComeBack,
    DeviceEvent,
    NotEligible,
    SignedTask,
    Standing,
    Task,
    training_settings,
)

#: Seconds between check-ins while there is no run; after one has ended, so short that the next run finds the devices
#: within the time that its places wait; and while a run does not ask the device.
IDLE_WINDOW_S = (1.0, 3.0)
FINISHED_WINDOW_S = (5.0, 15.0)
NOT_ELIGIBLE_WINDOW_S = (15.0, 30.0)
#: Seconds between check-ins of a device that only fetches releases.
NOT_TRAINING_WINDOW_S = (15.0, 30.0)
#: Seconds between check-ins of a device whose conditions keep it from working: they change slowly.
CONDITIONS_WINDOW_S = (60.0, 120.0)
#: Signs of life in a row that may be missing before a device is taken for lost.
MISSED_SIGNS = 3
#: Rounds whose least memory is remembered.
MOST_KNOWN = 64
#: Events by which a device gives a task back.
GIVING_BACK = frozenset({"task_refused", "task_failed", "out_of_memory"})
#: The event of a device whose conditions keep it from working, and why a task that it held went to another.
NOT_ELIGIBLE = "not_eligible"
#: The event of a device that cannot read which task it holds, since it trusts no word of it.
UNTRUSTED = "task_untrusted"


def check_in(
    stores: Stores, connection: Connection, device: Device, request: CheckInRequest, *, now_s: float
) -> CheckInResponse:
    """Answer a device that offers itself for work.

    A task that was handed out before and is still open is answered again, byte for byte.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        device: device that asks.
        request: check-in that it sent.
        now_s: the present moment.
    """
    # 1. Remember what it said of itself.
    reason = request.not_eligible
    if reason and reason != device_rows.not_eligible(connection, device.device_id):
        record(connection, now_s, NOT_ELIGIBLE, reason, device=device.name)
    device_rows.note_check_in(
        connection,
        device.device_id,
        seen_s=now_s,
        cap_bytes=request.cap_bytes,
        floor_bytes=request.floor_bytes,
        example_count=request.example_count,
        runtime_version=request.runtime_version,
        setup=request.setup,
        trains=request.trains,
        release=request.release,
        not_eligible=request.not_eligible,
    )
    protecting_rows.note(connection, device.device_id, protects=request.protects)
    # 2. Answer, and remember by when it was told to come back.
    answer, back_s = _answer(stores, connection, device, request, now_s=now_s)
    device_rows.expect(connection, device.device_id, now_s + back_s)
    return answer


def _answer(
    stores: Stores, connection: Connection, device: Device, request: CheckInRequest, *, now_s: float
) -> tuple[CheckInResponse, float]:
    """The answer to a check-in, and the most seconds until the device is heard of again."""
    waiting: ComeBack | NotEligible = ComeBack(*NOT_TRAINING_WINDOW_S, "the device takes no tasks")
    if request.trains and request.not_eligible:
        waiting = _without_work(connection, device, request.not_eligible, now_s=now_s)
    elif request.trains:
        answer, busy_s = _work_for(stores, connection, device, request, now_s=now_s)
        if isinstance(answer, SignedTask):
            return answer, busy_s
        waiting = answer
    release = newest_for(stores, connection, request.release)
    if release is not None:
        waiting = structs.replace(waiting, release=release)
    return waiting, waiting.after_max_s


def _work_for(
    stores: Stores, connection: Connection, device: Device, request: CheckInRequest, *, now_s: float
) -> tuple[CheckInResponse, float]:
    """What the runs that are going on have for a device, and how long it is then busy with it."""
    if request.protocol > PROTOCOL_VERSION:
        message = f"protocol {request.protocol} is newer than {PROTOCOL_VERSION} spoken here"
        return NotEligible("protocol_unknown", message, *NOT_ELIGIBLE_WINDOW_S), 0.0
    # 1. Is there a run?
    active = active_runs(stores, connection)
    training = [run for run in active if run.state == "running"]
    if not training:
        ended = bool(active) or run_rows.has_begun_any(connection)
        rests = ended and run_rows.first_queued(connection) is None
        window_s = FINISHED_WINDOW_S if rests else IDLE_WINDOW_S
        return ComeBack(*window_s, "run finished" if ended else "no run"), 0.0
    # 2. Has one of them a task for it? If not, it asks again as soon as the first of them wants it to.
    answers: list[ComeBack | NotEligible] = []
    for run in training:
        answer = _work_in(stores, connection, run, device, request, now_s=now_s)
        if isinstance(answer, SignedTask):
            return answer, run.config.deadline_s
        answers.append(answer)
    return min(answers, key=lambda each: (isinstance(each, NotEligible), each.after_max_s)), 0.0


def _work_in(
    stores: Stores,
    connection: Connection,
    run: Run,
    device: Device,
    request: CheckInRequest,
    *,
    now_s: float,
) -> CheckInResponse:
    """What one run has for a device."""
    # 1. Has the run set it aside?
    aside = still_set_aside(connection, run.run_id, device, now_s=now_s)
    if aside is not None:
        message = f"run {run.run_id} asks this device no more: {aside.reason}"
        return NotEligible("set_aside", message[:2000], *NOT_ELIGIBLE_WINDOW_S)
    # 2. Does it hold a slot of the open round?
    held = task_rows.find_open(connection, run.run_id, device.device_id)
    if held is not None:
        return held.signed or _hand_out(
            stores, connection, run, held, device=device, request=request, now_s=now_s
        )
    # 3. Could it hold one?
    if needs_protection(run) and not request.protects:
        return _cannot_protect(connection, run, device, now_s=now_s)
    needed = least_required_bytes(stores, connection, run, request.example_count)
    if needed > request.cap_bytes:
        return _too_small(connection, run, device, needed, request.cap_bytes, now_s=now_s)
    opened = run.next_round > 0 or round_rows.find_open(connection, run.run_id) is not None
    reason = "run paused" if run.paused else "not selected" if opened else "waiting for devices"
    return ComeBack(run.config.poll_min_s, run.config.poll_max_s, reason)


def _without_work(connection: Connection, device: Device, reason: str, *, now_s: float) -> ComeBack:
    """The answer to a device that may not work now; places that it holds go to others."""
    for run in run_rows.active(connection):
        held = task_rows.find_open(connection, run.run_id, device.device_id)
        if held is None:
            continue
        task_rows.lapse(connection, held.task_id, NOT_ELIGIBLE)
        record(
            connection,
            now_s,
            NOT_ELIGIBLE,
            f"{reason}; its place goes to another device",
            run_id=run.run_id,
            round_number=held.round,
            device=device.name,
            task_id=held.task_id,
        )
    return ComeBack(*CONDITIONS_WINDOW_S, f"not eligible: {reason}")


def say_alive(
    stores: Stores, connection: Connection, device: Device, task_id: str, *, now_s: float
) -> Standing:
    """Take in a sign of life of a device that works on a task.

    From its first one on the task lapses if :data:`MISSED_SIGNS` in a row are missing. A device that never sends any
    has until its deadline.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        device: device that sent it.
        task_id: id of the task.
        now_s: the present moment.

    Raises:
        NotFoundError: ``unknown_task``.
        ConflictError: ``not_your_task``.
    """
    task = find_task(connection, device, task_id)
    again_s = find_run(stores, connection, task.run_id).config.alive_every_s
    if task.state != "working":  # a round that closes lets its open tasks lapse
        return Standing(again_s, wanted=task.state == "counted")
    task_rows.note_alive(connection, task_id, by_s=now_s + MISSED_SIGNS * again_s)
    return Standing(again_s)


def report_event(connection: Connection, device: Device, event: DeviceEvent, *, now_s: float) -> None:
    """Record a device's event; those of :data:`GIVING_BACK` give its task back.

    Raises:
        MalformedError: ``malformed``, the event gives a task back and names none.
        NotFoundError: ``unknown_task``.
        ConflictError: ``not_your_task``.
    """
    if event.task_id is None:
        if event.code in GIVING_BACK:
            raise MalformedError("malformed", f"{event.code} must name its task_id")
        record(connection, now_s, event.code, event.message, device=device.name)
        if event.code == UNTRUSTED:
            _take_back_untrusted(connection, device, event, now_s=now_s)
        return
    task = task_rows.find(connection, event.task_id)
    if task is None:
        raise NotFoundError("unknown_task", f"no task {event.task_id}")
    if task.device_id != device.device_id:
        raise ConflictError("not_your_task", f"task {event.task_id} was given to another device")
    record(
        connection,
        now_s,
        event.code,
        event.message,
        run_id=task.run_id,
        round_number=task.round,
        device=device.name,
        task_id=event.task_id,
    )
    if event.code in GIVING_BACK and task.state in ("reserved", "working"):
        task_rows.lapse(connection, event.task_id, event.code)
        note_failure(connection, task.run_id, device, event, now_s=now_s)


def _take_back_untrusted(connection: Connection, device: Device, event: DeviceEvent, *, now_s: float) -> None:
    """A device that trusts no task of ours gets none: the one that it holds goes to another."""
    for run in run_rows.active(connection):
        held = task_rows.find_open(connection, run.run_id, device.device_id)
        if held is not None and held.signed is not None:
            task_rows.lapse(connection, held.task_id, UNTRUSTED)
            note_failure(connection, run.run_id, device, event, now_s=now_s)


def reserve(
    connection: Connection,
    run: Run,
    round_number: int,
    slot: int,
    device_id: str,
    *,
    now_s: float,
    until_s: float,
) -> None:
    """Reserve a slot of a round for a device until it checks in, at most until ``until_s``."""
    attempt = task_rows.count_attempts(connection, run.run_id, round_number, slot)
    task_rows.reserve(
        connection,
        f"{run.run_id}-r{round_number}-s{slot}-a{attempt}",
        run_id=run.run_id,
        number=round_number,
        slot=slot,
        attempt=attempt,
        device_id=device_id,
        reserved_s=now_s,
        due_s=until_s,
    )


def _hand_out(
    stores: Stores,
    connection: Connection,
    run: Run,
    held: TaskWithSlices,
    *,
    device: Device,
    request: CheckInRequest,
    now_s: float,
) -> SignedTask | NotEligible:
    config = run.settings
    exits = exits_for(run.manifest, config, held.slices, request.cap_bytes)
    leave = exits[-1] if exits else 0
    rank = rank_for(run.manifest, config, held.slices, request.cap_bytes, leave)
    needed = required_bytes(run.manifest, config, held.slices, request.example_count, rank, leave)
    if needed > request.cap_bytes:
        task_rows.lapse(connection, held.task_id, "cap_too_small")
        return _too_small(connection, run, device, needed, request.cap_bytes, now_s=now_s)
    head = run.manifest.head
    shared = training_settings(config)
    shared["train_head"] = head is not None and head.name in held.slices
    slices = held.slices
    if exits:
        shared |= {"exits": exits, "features": exits[-1:]}
        slices = reached(run.manifest, slices, leave)
    shared["sequence_limit"] = min(config.sequence_limit, run.manifest.sequence_limit)
    task = Task(
        task_id=held.task_id,
        run_id=run.run_id,
        round=held.round,
        slot=held.slot,
        package=run.package_sha256,
        package_signature=run.package_signature,
        state=_values_at_rank(stores, run, rank),
        slices=tuple(name for name in slices if head is None or name != head.name),
        optimizer=config.local_optimizer,
        required_bytes=needed,
        deadline_s=config.deadline_s,
        freeze_a=config.lora_aggregation == "frozen_a",
        reference=run.reference_sha256,
        rank=rank,
        handed_in=_handed_in(connection, run, device),
        protection=protection_of(run),
        **shared,
    )
    data = messages.encode(task)
    signed = SignedTask(data.decode(), stores.key.sign(data))
    task_rows.hand_out(
        connection,
        held.task_id,
        due_s=now_s + config.deadline_s,
        required_bytes=needed,
        task=signed.task,
        signature=signed.signature,
        committed_before=run.committed,
    )
    return signed


def _values_at_rank(stores: Stores, run: Run, rank: int) -> str:
    """Digest of the values that a device of this rank is given: those of its ranks alone."""
    if rank in (0, rank_of(run.manifest)):
        return run.values_sha256
    asked = (run.values_sha256, rank)
    if asked not in stores.values_at_rank:
        values = decode_values(stores.blobs.get(run.values_sha256), run.manifest.slices)
        narrowed = with_rank(run.manifest, rank)
        if any(sha256 != run.values_sha256 for sha256, _ in stores.values_at_rank):
            stores.values_at_rank.clear()  # of earlier rounds
        stores.values_at_rank[asked] = stores.blobs.put(encode_values(cut(values, narrowed.slices), narrowed))
    return stores.values_at_rank[asked]


def _handed_in(connection: Connection, run: Run, device: Device) -> tuple[str, ...]:
    """Digests of a device's sums among those that a visit goes on from."""
    if run.config.continue_from is None or not run.visiting:
        return ()
    return result_rows.standing_sums(connection, run.config.continue_from, device.device_id)


def least_required_bytes(stores: Stores, connection: Connection, run: Run, rows: int) -> int:
    """The least memory that any slot needs, in the open round or else in a full round to come.

    In a visit it depends on the rows that the device has.
    """
    if run.visiting:
        return required_bytes(run.manifest, run.settings, (run.head_name,), rows)
    opened = round_rows.find_open(connection, run.run_id)
    number = opened.round if opened is not None and opened.state != "aggregating" else None
    asked = (run.run_id, number, run.next_round, run.committed)
    found = stores.least_required_bytes.get(asked)
    if found is None:
        dealt = run.deal(run.config.devices_per_round)
        if number is not None:
            dealt = (
                slot_rows.dealt(connection, run.run_id, number) or dealt
            )  # a buffered round begins with none
        found = min(required_bytes(run.manifest, run.settings, slices) for slices in set(dealt))
        if len(stores.least_required_bytes) >= MOST_KNOWN:
            stores.least_required_bytes.clear()  # every check-in asks, and all of them the same
        stores.least_required_bytes[asked] = found
    return found


def _cannot_protect(connection: Connection, run: Run, device: Device, *, now_s: float) -> NotEligible:
    code = "cannot_protect"
    message = (
        f"run {run.run_id} has contributions clipped, noised or masked on devices, which this version of the runtime "
        "does not know; install a newer one"
    )
    if not event_rows.was_recorded(
        connection, run_id=run.run_id, device_name=device.name, code=code, message=message
    ):
        record(connection, now_s, code, message, run_id=run.run_id, device=device.name)
    return NotEligible(code, message, *NOT_ELIGIBLE_WINDOW_S)


def _too_small(
    connection: Connection, run: Run, device: Device, needed: int, cap_bytes: int, *, now_s: float
) -> NotEligible:
    message = (
        f"needs {whole_size(needed, up=True)}, the cap is {size(cap_bytes)}; "
        f"grant more memory to serve run {run.run_id}"
    )
    code = "cap_too_small"
    if not event_rows.was_recorded(
        connection, run_id=run.run_id, device_name=device.name, code=code, message=message
    ):
        record(connection, now_s, code, message, run_id=run.run_id, device=device.name)
    return NotEligible(code, message, *NOT_ELIGIBLE_WINDOW_S)
