"""Releases: values of a run that devices are told to use, trained there or not."""

from __future__ import annotations

from coordinator.events import record
from coordinator.refusals import ConflictError, NotFoundError
from coordinator.rounds.runs import Run, find_run, run_of
from coordinator.storage import checkpoint_rows, release_rows, round_rows, run_rows
from coordinator.storage.connection import Connection
from coordinator.storage.release_rows import Limits, ReleaseRow
from coordinator.storage.stores import Stores
from edge_runtime.protocol.messages import Release, SignedRelease, encode


def publish(
    stores: Stores,
    connection: Connection,
    run_id: str,
    round_number: int | None,
    limits: Limits,
    *,
    each_round: bool,
    now_s: float,
) -> ReleaseRow:
    """Publish the values of a run, or those after one of its rounds.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        run_id: id of the run, or ``latest``.
        round_number: number of the round after which the values stood; None takes those that the run is evaluated by.
        limits: what a device's own check must find.
        each_round: whether each further committed round becomes a release under the same limits.
        now_s: the present moment.

    Raises:
        NotFoundError: there is no such run, no such committed round, or its values are gone.
        ConflictError: the run has committed no round yet, or has ended and can commit none.
    """
    run = find_run(stores, connection, run_id)
    last = round_rows.last_committed(connection, run.run_id)
    if last is None:
        raise ConflictError(
            "nothing_to_release",
            f"run {run.run_id} has committed no round yet, so nothing was learned; wait for one",
        )
    if each_round and run.state not in ("queued", "running"):
        raise ConflictError(
            "run_ended",
            f"run {run.run_id} is {run.state} and commits no further round; leave out --each-round",
        )
    number = last if round_number is None else round_number
    values = run.result_sha256 if round_number is None else _values_after(connection, run, round_number)
    if stores.blobs.find(values) is None:
        raise NotFoundError(
            "unknown_blob", f"the values after round {number} of run {run.run_id} are missing on the disk"
        )
    if each_round:
        release_rows.publish_each_round(connection, run.run_id, limits)
    return _add(connection, run.run_id, number, values, limits, now_s=now_s)


def note_commit(
    connection: Connection, run_id: str, round_number: int, values_sha256: str, *, now_s: float
) -> None:
    """Publish a round that was committed just now, where its run's rounds become releases."""
    limits = release_rows.limits_of_each_round(connection, run_id)
    if limits is not None:
        _add(connection, run_id, round_number, values_sha256, limits, now_s=now_s)


def newest_for(stores: Stores, connection: Connection, decided: int) -> SignedRelease | None:
    """The newest release, signed; None if a device has decided about it already.

    Args:
        stores: handles on the state folder.
        connection: connection with a transaction under way.
        decided: number of the newest release that the device has taken or refused.
    """
    row = release_rows.newest(connection)
    if row is None or row.number <= decided:
        return None
    run = run_of(stores, run_rows.get(connection, row.run_id))
    text = encode(
        Release(
            number=row.number,
            run_id=row.run_id,
            round=row.round,
            package=run.package_sha256,
            package_signature=run.package_signature,
            values=row.values_sha256,
            sequence_limit=min(run.config.sequence_limit, run.manifest.sequence_limit),
            lowest_accuracy=row.lowest_accuracy,
            highest_loss=row.highest_loss,
            features=run.config.features,
            pooling=run.config.pooling,
        )
    ).decode()
    return SignedRelease(text, stores.key.sign(text.encode()))


def _values_after(connection: Connection, run: Run, round_number: int) -> str:
    """Values after a round; of rounds from before these were kept, those that the next one started from."""
    rounds = round_rows.all_rounds(connection, run.run_id)
    if not any(
        each.round == round_number and each.state == "committed" and each.rolled_back_s is None
        for each in rounds
    ):
        raise NotFoundError(
            "unknown_round",
            f"run {run.run_id} has committed no round {round_number} that counts; edge-coordinator run show lists them",
        )
    kept = checkpoint_rows.values_after(connection, run.run_id, round_number)
    return kept or next(
        (each.values_sha256 for each in rounds if each.round > round_number), run.values_sha256
    )


def _add(
    connection: Connection, run_id: str, number: int, values: str, limits: Limits, *, now_s: float
) -> ReleaseRow:
    row = release_rows.add(connection, run_id, number, values, limits, published_s=now_s)
    record(
        connection,
        now_s,
        "released",
        f"release {row.number}: values after round {number}",
        run_id=run_id,
        round_number=number,
    )
    return row
