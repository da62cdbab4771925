"""Rows of ``evaluations``: pending, done or failed. Round -1 stands for the values that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class PendingEvaluation:
    """An evaluation that waits.

    Attributes:
        run_id: id of the run.
        round: number of the round whose values are meant.
        values_sha256: slice values to evaluate.
    """

    run_id: str
    round: int
    values_sha256: str


class GroupAccuracy(Struct, frozen=True):
    """What an evaluation found on the rows of a group.

    Attributes:
        rows: number of rows.
        accuracy: share of them that were predicted right.
    """

    rows: int
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        round: number of the round whose values were meant.
        accuracy: share of rows, or of next tokens, that were predicted right.
        mean_loss: mean loss over the rows, or over the tokens.
        tokens: number of predicted tokens that the loss is a mean over; with 0 it is a mean over rows.
    """

    round: int
    accuracy: float
    mean_loss: float
    tokens: int


def add(connection: Connection, run_id: str, number: int, values_sha256: str) -> None:
    """Ask for an evaluation."""
    connection.execute(
        "INSERT INTO evaluations (run_id, round, values_sha256, state) VALUES (?, ?, ?, 'pending')",
        (run_id, number, values_sha256),
    )


def first_pending(connection: Connection) -> PendingEvaluation | None:
    """The evaluation that has waited for longest."""
    row = connection.execute(
        "SELECT run_id, round, evaluations.values_sha256 FROM evaluations JOIN runs USING (run_id)"
        " WHERE evaluations.state = 'pending' ORDER BY position, round LIMIT 1"
    ).fetchone()
    return None if row is None else PendingEvaluation(**row)


def is_known(connection: Connection, run_id: str, number: int) -> bool:
    """Whether an evaluation after a round was asked for, whatever came of it."""
    row = connection.execute(
        "SELECT 1 FROM evaluations WHERE run_id = ? AND round = ?", (run_id, number)
    ).fetchone()
    return row is not None


def has_pending(connection: Connection, run_id: str) -> bool:
    """Whether an evaluation of a run waits."""
    row = connection.execute(
        "SELECT 1 FROM evaluations WHERE run_id = ? AND state = 'pending'", (run_id,)
    ).fetchone()
    return row is not None


def done(connection: Connection, run_id: str) -> list[Scores]:
    """What the evaluations of a run found, those of the rounds that count, in their order."""
    return [scores for scores, counts in all_done(connection, run_id) if counts]


def all_done(connection: Connection, run_id: str) -> list[tuple[Scores, bool]]:
    """What all evaluations of a run found, in the order of their rounds, and whether their round counts."""
    rows = connection.execute(
        "SELECT round, accuracy, evaluations.mean_loss, tokens, rolled_back_s IS NULL AS counts"
        " FROM evaluations LEFT JOIN rounds USING (run_id, round)"
        " WHERE run_id = ? AND evaluations.state = 'done' ORDER BY round",
        (run_id,),
    )
    return [(Scores(*row[:4]), bool(row["counts"])) for row in rows]


def values_of(connection: Connection, run_id: str, number: int) -> str:
    """Digest of the slice values that an evaluation was of; :class:`LookupError` if there is no such evaluation."""
    row = connection.execute(
        "SELECT values_sha256 FROM evaluations WHERE run_id = ? AND round = ?", (run_id, number)
    ).fetchone()
    if row is None:
        raise LookupError(f"run {run_id} has no evaluation of round {number}")
    return str(row["values_sha256"])


def find_done(connection: Connection, run_id: str, number: int) -> Scores | None:
    """What the evaluation after a round found, if it was made."""
    row = connection.execute(
        "SELECT round, accuracy, mean_loss, tokens FROM evaluations"
        " WHERE run_id = ? AND round = ? AND state = 'done'",
        (run_id, number),
    ).fetchone()
    return None if row is None else Scores(**row)


def find_last_done(connection: Connection, run_id: str) -> Scores | None:
    """What the evaluation after the newest evaluated round found, if any was made."""
    row = connection.execute(
        "SELECT round, accuracy, mean_loss, tokens FROM evaluations"
        " WHERE run_id = ? AND state = 'done' ORDER BY round DESC LIMIT 1",
        (run_id,),
    ).fetchone()
    return None if row is None else Scores(**row)


def store_done(
    connection: Connection,
    run_id: str,
    number: int,
    *,
    rows: int,
    accuracy: float,
    mean_loss: float,
    seconds: float,
    tokens: int,
    groups: Mapping[str, GroupAccuracy],
) -> None:
    """Store what an evaluation found."""
    scores = msgspec.json.encode(dict(groups)).decode()
    connection.execute(
        "UPDATE evaluations SET state = 'done', rows = ?, accuracy = ?, mean_loss = ?, seconds = ?, tokens = ?,"
        " group_scores = ? WHERE run_id = ? AND round = ?",
        (rows, accuracy, mean_loss, seconds, tokens, scores, run_id, number),
    )


def groups_of(connection: Connection, run_id: str, number: int) -> dict[str, GroupAccuracy]:
    """What the evaluation after a round found on the rows of each group; empty if it was not made."""
    row = connection.execute(
        "SELECT group_scores FROM evaluations WHERE run_id = ? AND round = ? AND state = 'done'",
        (run_id, number),
    ).fetchone()
    return {} if row is None else msgspec.json.decode(row["group_scores"], type=dict[str, GroupAccuracy])


def store_failed(connection: Connection, run_id: str, number: int, message: str) -> None:
    """Store why an evaluation failed."""
    connection.execute(
        "UPDATE evaluations SET state = 'failed', message = ? WHERE run_id = ? AND round = ?",
        (message, run_id, number),
    )


def drop_pending(connection: Connection, run_id: str, after: int | None = None) -> None:
    """Give up the evaluations of a run that wait, or those of rounds after one."""
    connection.execute(
        "DELETE FROM evaluations WHERE run_id = ? AND state = 'pending' AND round > coalesce(?, round - 1)",
        (run_id, after),
    )
