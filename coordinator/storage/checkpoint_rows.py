"""Rows of ``checkpoints``: what a run had come to after each committed round, so that it can go back there."""

from __future__ import annotations

from coordinator.storage.connection import Connection

_COLUMNS = (
    "values_sha256, optimizer_sha256, average_sha256, reference_sha256,"
    " committed, visit_rounds, phase, delta_sizes"
)


def add(connection: Connection, run_id: str, number: int) -> None:
    """Keep what a run has come to with a round, in the transaction that commits it."""
    connection.execute(
        f"INSERT INTO checkpoints (run_id, round, {_COLUMNS})"  # noqa: S608 - a constant
        f" SELECT run_id, ?, {_COLUMNS} FROM runs WHERE run_id = ?",
        (number, run_id),
    )


def values_after(connection: Connection, run_id: str, number: int) -> str | None:
    """Digest of the values after a committed round; None of a round that was committed before these were kept."""
    row = connection.execute(
        "SELECT values_sha256 FROM checkpoints WHERE run_id = ? AND round = ?", (run_id, number)
    ).fetchone()
    return None if row is None else str(row["values_sha256"])


def restorable(connection: Connection, run_id: str, *, most: int) -> list[int]:
    """Numbers of the rounds that a run can go back to, in order: those that count, the newest ones.

    Args:
        connection: connection to the database.
        run_id: id of the run.
        most: number of them whose server state is kept.
    """
    rows = connection.execute(
        "SELECT round FROM checkpoints JOIN rounds USING (run_id, round)"
        " WHERE run_id = ? AND rolled_back_s IS NULL ORDER BY round DESC LIMIT ?",
        (run_id, most),
    )
    return sorted(int(row["round"]) for row in rows)


def restore(connection: Connection, run_id: str, number: int) -> None:
    """Let a run stand where it stood after a round."""
    connection.execute(
        f"UPDATE runs SET ({_COLUMNS}) = (SELECT {_COLUMNS} FROM checkpoints WHERE run_id = runs.run_id"  # noqa: S608
        " AND round = ?), abandoned_in_a_row = 0, state = 'running' WHERE run_id = ?",
        (number, run_id),
    )


def states(connection: Connection, run_id: str, *, most: int) -> list[str]:
    """Digests of the server states of a run's newest committed rounds that count, the newest first."""
    rows = connection.execute(
        "SELECT optimizer_sha256 FROM checkpoints JOIN rounds USING (run_id, round)"
        " WHERE run_id = ? AND rolled_back_s IS NULL AND optimizer_sha256 IS NOT NULL"
        " ORDER BY round DESC LIMIT ?",
        (run_id, most),
    )
    return [str(row["optimizer_sha256"]) for row in rows]


def needed_states(connection: Connection, *, most: int) -> set[str]:
    """Digests of the server states that runs which have not ended may go back to, so many of each."""
    rows = connection.execute(
        "SELECT optimizer_sha256 FROM ("
        " SELECT checkpoints.optimizer_sha256, row_number() OVER (PARTITION BY run_id ORDER BY round DESC) AS place"
        " FROM checkpoints JOIN rounds USING (run_id, round) JOIN runs USING (run_id)"
        " WHERE rolled_back_s IS NULL AND runs.state IN ('queued', 'running', 'evaluating')"
        ") AS placed WHERE place <= ? AND optimizer_sha256 IS NOT NULL",
        (most,),
    )
    return {str(row[0]) for row in rows}
