"""A round whose contributions are masked, after its results: shares, masked contributions, shares that unmask.

What a device hands in as its result are keys; so rounds collect, replace devices and close as all rounds do. Then three
kinds of answers are waited for, each until its time is over or all have come; whoever is missing falls out. Each step
is one transaction, so a coordinator that was killed goes on where it stood.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.masked_sum import neighbours, threshold_of, unmasked_sum
from coordinator.aggregation.mean import Contribution
from coordinator.auth import Device
from coordinator.config import LEAST_MASKED
from coordinator.refusals import ConflictError, UnusableError
from coordinator.rounds.deltas import of_vector
from coordinator.rounds.private_rounds import adds_noise, noise_key, with_server_noise
from coordinator.rounds.results import find_task
from coordinator.rounds.runs import Run, find_run
from coordinator.storage import masking_rows
from coordinator.storage.connection import Connection
from coordinator.storage.masking_rows import Stage
from coordinator.storage.result_rows import CountedResult
from coordinator.storage.stores import Stores
from coordinator.storage.task_rows import TaskWithRound
from edge_runtime.errors import EdgeError, ProtocolError
from edge_runtime.package.slices import Values, decode_values
from edge_runtime.protocol.messages import (
    MaskingKeys,
    MaskingOver,
    MaskingStage,
    MaskingWait,
    Peer,
    Protection,
    ResultReceipt,
    RevealedShares,
    SealedShare,
    SealedShares,
    SendMasked,
    ShareSecrets,
    Task,
    Unmask,
)
from edge_runtime.training.feature_sums import FeatureSums, check_sums
from edge_runtime.training.protected import layout_of, unflat_sums

#: Seconds between two questions of a device, at least: stages are short.
LEAST_WAIT_S = 0.05
#: What is waited for next.
NEXT: dict[Stage, Stage] = {"shares": "vector", "vector": "reveal"}


class RoundLostError(EdgeError):
    """A masked round has too few devices left: it is abandoned, and the next one begins anew."""


@dataclass(frozen=True)
class MaskedSum:
    """What a masked round gave.

    Attributes:
        task: one of its tasks; all but slot and names are the same in each.
        numbers: sum of the contributions, as integers; the weights' comes last, but for sums.
        devices: number of devices that contributed.
    """

    task: Task
    numbers: NDArray[np.int64]
    devices: int


@dataclass(frozen=True)
class _Standing:
    """Who is still there: what came by slot, as it is stored; every request looks, so only what it needs is parsed."""

    keys: dict[int, bytes]
    shared: dict[int, bytes]
    vectors: dict[int, bytes]
    revealed: dict[int, bytes]
    near: dict[int, tuple[int, ...]]

    def masked_against(self, slot: int) -> list[int]:
        """Neighbours of a device that shared secrets with it."""
        return [other for other in self.near[slot] if other in self.shared]

    def keys_of(self, slot: int) -> MaskingKeys:
        """Keys of a device."""
        return msgspec.json.decode(self.keys[slot], type=MaskingKeys)


def _standing(connection: Connection, run: Run, number: int) -> _Standing:
    def answers(stage: Stage) -> dict[int, bytes]:
        return masking_rows.of_round(connection, run.run_id, number, stage)

    keys = answers("keys")
    all_keys = hashlib.sha256(b"".join(keys[slot] for slot in sorted(keys))).hexdigest()
    near = neighbours(list(keys), f"{run.run_id} {number} {all_keys}")
    return _Standing(keys, answers("shares"), answers("vector"), answers("reveal"), near)


# What devices ask and answer.


def stage_for(stores: Stores, connection: Connection, device: Device, task_id: str) -> MaskingStage:
    """What is asked of a device for a task of which it handed in keys.

    Raises:
        NotFoundError: ``unknown_task``.
        ConflictError: ``not_your_task``.
    """
    task = find_task(connection, device, task_id)
    if task.state != "counted" or task.round_state in ("committed", "abandoned"):
        return MaskingOver(f"the round is over for this task ({task.reason or task.round_state})")
    run = find_run(stores, connection, task.run_id)
    wait = MaskingWait(max(LEAST_WAIT_S, run.config.poll_min_s))
    stage = masking_rows.stage_of(connection, task.run_id, task.round)
    if stage is None:
        return wait
    if masking_rows.find(connection, task_id, stage[0]) is not None:
        return wait
    return _asked_of(connection, run, task, stage[0])


def _asked_of(connection: Connection, run: Run, task: TaskWithRound, waits_for: Stage) -> MaskingStage:
    """What a round asks of a device that has not answered it yet."""
    standing, slot = _standing(connection, run, task.round), task.slot
    if waits_for == "shares":
        near = standing.near[slot]
        named = masking_rows.identities(connection, task.run_id, task.round)
        peers = tuple(Peer(other, *named[other], standing.keys_of(other)) for other in near)
        return ShareSecrets(threshold_of(len(near)), peers)
    if waits_for == "vector" and slot in standing.shared:
        return SendMasked(
            tuple(
                SealedShare(other, share.sealed)
                for other in standing.masked_against(slot)
                for share in msgspec.json.decode(standing.shared[other], type=SealedShares).shares
                if share.slot == slot
            )
        )
    if waits_for == "reveal" and slot in standing.vectors:
        return _question(standing, slot)
    return MaskingOver("the round went on without this device")


def take_shares(
    stores: Stores, connection: Connection, device: Device, task_id: str, shares: SealedShares
) -> ResultReceipt:
    """Take in what a device sealed for its neighbours.

    Raises:
        RefusalError: it is not asked for that now (``stale``), answered otherwise before (``conflict``), or sealed for
            others than its neighbours (``bad_shares``).
    """
    task, run = _asked(stores, connection, device, task_id)
    data = msgspec.json.encode(shares)
    if (receipt := _known(connection, task, "shares", data)) is not None:
        return receipt
    near = _standing(connection, run, task.round).near[task.slot]
    if sorted(share.slot for share in shares.shares) != sorted(near):
        raise UnusableError("bad_shares", f"shares are for the {len(near)} neighbours of the task, each once")
    masking_rows.add(connection, task_id, "shares", data)
    return ResultReceipt("counted")


def take_masked(
    stores: Stores, connection: Connection, device: Device, task_id: str, data: bytes
) -> ResultReceipt:
    """Take in a masked contribution.

    Raises:
        RefusalError: ``stale`` or ``conflict`` as :func:`take_shares`; ``bad_vector``, it has another length.
    """
    task, run = _asked(stores, connection, device, task_id)
    digest = hashlib.sha256(data).hexdigest()
    if (receipt := _known(connection, task, "vector", digest.encode())) is not None:
        return receipt
    wanted = _count(run, task.read_task()) * _protection(task.read_task()).masked_bits // 8
    if len(data) != wanted:
        raise UnusableError(
            "bad_vector", f"a masked contribution of {len(data)} bytes, where {wanted} are asked for"
        )
    stores.private_blobs.put(data)
    masking_rows.add(connection, task_id, "vector", digest.encode())
    masking_rows.note_bytes(connection, task_id, len(data))
    return ResultReceipt("counted")


def take_revealed(
    stores: Stores, connection: Connection, device: Device, task_id: str, shares: RevealedShares
) -> ResultReceipt:
    """Take in the shares that a device reveals.

    Raises:
        RefusalError: ``stale`` or ``conflict`` as :func:`take_shares`; ``bad_shares``, they are of other devices.
    """
    task, run = _asked(stores, connection, device, task_id)
    data = msgspec.json.encode(shares)
    if (receipt := _known(connection, task, "reveal", data)) is not None:
        return receipt
    question = _question(_standing(connection, run, task.round), task.slot)
    if sorted(share.slot for share in shares.shares) != sorted((*question.contributed, *question.fell_out)):
        raise UnusableError("bad_shares", "shares are of those that the question names, each once")
    masking_rows.add(connection, task_id, "reveal", data)
    return ResultReceipt("counted")


def _asked(stores: Stores, connection: Connection, device: Device, task_id: str) -> tuple[TaskWithRound, Run]:
    task = find_task(connection, device, task_id)
    if task.state != "counted" or task.round_state != "aggregating":
        raise ConflictError("stale", f"task {task_id} is not asked for anything now; ask for its stage")
    return task, find_run(stores, connection, task.run_id)


def _known(connection: Connection, task: TaskWithRound, stage: Stage, data: bytes) -> ResultReceipt | None:
    """The receipt of an answer that was given before; None if it is to be taken in now."""
    before = masking_rows.find(connection, task.task_id, stage)
    if before is not None:
        if before == data:
            return ResultReceipt("duplicate")
        raise ConflictError("conflict", f"task {task.task_id} has answered this stage otherwise")
    waiting = masking_rows.stage_of(connection, task.run_id, task.round)
    earlier: dict[Stage, Stage] = {"shares": "keys", "vector": "shares", "reveal": "vector"}
    if (
        waiting is None
        or waiting[0] != stage
        or masking_rows.find(connection, task.task_id, earlier[stage]) is None
    ):
        raise ConflictError(
            "stale", f"the round of task {task.task_id} does not wait for this; ask for its stage"
        )
    return None


def _question(standing: _Standing, slot: int) -> Unmask:
    against = standing.masked_against(slot)
    return Unmask(
        contributed=tuple(sorted([slot, *(other for other in against if other in standing.vectors)])),
        fell_out=tuple(sorted(other for other in against if other not in standing.vectors)),
    )


# What the round does.


def advance(
    stores: Stores, run: Run, number: int, results: list[CountedResult], now_s: float
) -> MaskedSum | None:
    """Go on with a masked round as far as it can.

    Returns:
        The sum; None while answers are waited for.

    Raises:
        RoundLostError: too few devices are left.
    """
    due_s = now_s + run.config.selection_s
    with stores.storage.transaction() as connection:
        stage = masking_rows.stage_of(connection, run.run_id, number)
        if stage is None:
            masking_rows.set_stage(connection, run.run_id, number, "shares", due_s=due_s)
            return None
        standing = _standing(connection, run, number)
        waits_for, until_s = stage
        came, wanted, what = {
            "shares": (len(standing.shared), len(standing.keys), "shared secrets"),
            "vector": (len(standing.vectors), len(standing.shared), "contributed"),
            "reveal": (len(standing.revealed), len(standing.vectors), ""),
        }[waits_for]
        if came < wanted and now_s < until_s:
            return None
        if what:
            _check_enough(run, came, what)
            masking_rows.set_stage(connection, run.run_id, number, NEXT[waits_for], due_s=due_s)
            return None
    return _unmasked(stores, run, standing, msgspec.json.decode(results[0].task, type=Task))


def _check_enough(run: Run, count: int, what: str) -> None:
    least = max(run.least_results, LEAST_MASKED)
    if count < least:
        raise RoundLostError(f"{count} devices of at least {least} {what}")


def _unmasked(stores: Stores, run: Run, standing: _Standing, task: Task) -> MaskedSum:
    revealed: dict[int, dict[int, bytes]] = {}
    for by, data in standing.revealed.items():
        for share in msgspec.json.decode(data, type=RevealedShares).shares:
            revealed.setdefault(share.slot, {})[by + 1] = share.share
    try:
        numbers = unmasked_sum(
            ((slot, stores.private_blobs.get(sha256.decode())) for slot, sha256 in standing.vectors.items()),
            bits=_protection(task).masked_bits,
            count=_count(run, task),
            contributed=standing.vectors,
            masked_against={slot: standing.masked_against(slot) for slot in standing.shared},
            mask_keys={slot: standing.keys_of(slot).mask_key for slot in standing.keys},
            thresholds={slot: threshold_of(len(near)) for slot, near in standing.near.items()},
            revealed=revealed,
        )
    except ProtocolError as error:
        raise RoundLostError(f"the sum cannot be unmasked: {error}") from error
    return MaskedSum(task, numbers, len(standing.vectors))


def masked_mean(stores: Stores, run: Run, number: int, found: MaskedSum, values: Values) -> Contribution:
    """The mean of a masked round as one contribution; with noise by the server, noised and over all places."""
    task, protection = found.task, _protection(found.task)
    vector = found.numbers[:-1].astype(np.float64) * protection.quantum
    weight = float(found.numbers[-1]) / protection.largest
    if adds_noise(run.config):
        vector = with_server_noise(run, noise_key(run, number), vector) / run.config.devices_per_round
    elif weight > 0:
        vector = vector / weight
    reference = None
    if task.report == "scalars" and task.reference is not None:
        reference = decode_values(stores.blobs.get(task.reference), run.manifest.slices)
    return Contribution(examples=1, delta=of_vector(run.manifest, task, values, vector, reference))


def masked_sums(run: Run, number: int, found: MaskedSum) -> FeatureSums:
    """The sums of a masked round of a visit.

    Raises:
        SliceError: they are larger than their rows allow, so that some device's were.
    """
    layout = layout_of(found.task, run.manifest)
    if layout.form is None:
        raise ProtocolError("a visit's tasks gather sums")
    vector = found.numbers.astype(np.float64) * _protection(found.task).quantum
    if adds_noise(run.config):
        vector = with_server_noise(run, noise_key(run, number), vector)
    sums = unflat_sums(layout.form, vector)
    if run.config.privacy is None:
        check_sums(sums, layout.form)
    return sums


def close(stores: Stores, connection: Connection, run: Run) -> None:
    """Forget what the devices of a masked round answered, in the transaction that closes it."""
    if run.config.secure_aggregation:
        for sha256 in masking_rows.forget(connection, run.run_id):
            stores.private_blobs.discard(sha256)


def _protection(task: Task) -> Protection:
    if task.protection is None:
        raise ProtocolError(f"task {task.task_id} is not masked")
    return task.protection


def _count(run: Run, task: Task) -> int:
    """How many integers a task's masked contribution has; of all but sums the weight is one more."""
    layout = layout_of(task, run.manifest)
    return layout.length + (layout.form is None)
