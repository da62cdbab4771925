"""Rows of ``privacy_spent``: what ε a run had come to after each round that gave something away."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection

#: In place of the number of a round: what a run may come to at its end.
AT_END = -1


@dataclass(frozen=True)
class SpentRow:
    """What a run had spent after a round.

    Attributes:
        run_id: id of the run.
        round: number of the round, or :data:`AT_END`.
        participations: rounds in which the busiest device had taken part.
        epsilon: ε of as many, at the run's δ.
    """

    run_id: str
    round: int
    participations: int
    epsilon: float


def add(connection: Connection, row: SpentRow | None) -> None:
    """Store what a run has spent; None is of a run without privacy."""
    if row is None:
        return
    connection.execute(
        "INSERT INTO privacy_spent VALUES (?, ?, ?, ?) ON CONFLICT (run_id, round)"
        " DO UPDATE SET participations = excluded.participations, epsilon = excluded.epsilon",
        (row.run_id, row.round, row.participations, row.epsilon),
    )


def last(connection: Connection, run_id: str) -> SpentRow | None:
    """What a run has spent so far; None before its first round. Rounds that were taken back were told all the same."""
    row = connection.execute(
        "SELECT * FROM privacy_spent WHERE run_id = ? AND round >= 0 ORDER BY epsilon DESC, round DESC LIMIT 1",
        (run_id,),
    ).fetchone()
    return None if row is None else SpentRow(**row)


def at_end(connection: Connection, run_id: str) -> SpentRow | None:
    """What a run may come to at its end; None of one without privacy."""
    row = connection.execute(
        "SELECT * FROM privacy_spent WHERE run_id = ? AND round = ?", (run_id, AT_END)
    ).fetchone()
    return None if row is None else SpentRow(**row)


def most_participations(connection: Connection, run_id: str) -> int:
    """In how many rounds the busiest device handed in a result that counts, whatever became of the rounds."""
    row = connection.execute(
        "SELECT max(times) FROM (SELECT count(*) AS times FROM tasks WHERE run_id = ? AND state = 'counted'"
        " GROUP BY device_id) AS counted",
        (run_id,),
    ).fetchone()
    return int(row[0] or 0)


def used_up(connection: Connection, run_id: str, most: int) -> set[str]:
    """Ids of the devices that have taken part so many times."""
    rows = connection.execute(
        "SELECT device_id FROM tasks WHERE run_id = ? AND state = 'counted' GROUP BY device_id"
        " HAVING count(*) >= ?",
        (run_id, most),
    )
    return {str(row["device_id"]) for row in rows}
