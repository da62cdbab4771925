"""Rows of ``runs``: their configuration, where they stand, and which blobs hold their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class RunRow:
    """A run as it is stored.

    Attributes:
        position: place in the queue of all runs.
        run_id: id of the run.
        config: JSON of its :class:`coordinator.config.RunConfig`.
        package_sha256: digest of its package's manifest.
        package_signature: the publisher's signature of that manifest.
        state: queued, running, evaluating, finished, failed or stopped.
        reason: why it ended; empty until then.
        created_s: moment when the operator created it.
        started_s: moment when it began; None before that.
        finished_s: moment when it ended; None before that.
        values_sha256: slice values from which training goes on.
        optimizer_sha256: the server's state beside the values; None before the first commit.
        next_round: number of the next round to open.
        committed: number of committed rounds.
        abandoned_in_a_row: number of rounds that were abandoned since the last commit.
        average_sha256: mean of the values after several rounds; None while there is none.
        reference_sha256: deltas that the next round's directions are compared with; None if they are not.
        phase: training, first_visit or last_visit.
        visit_rounds: number of committed rounds of visits, which ``committed`` does not count.
        delta_sizes: JSON of the sizes that deltas had in the last committed round that trained a slice, by slice.
        paused_s: moment when the operator paused it; None while it goes on.
    """

    position: int
    run_id: str
    config: str
    package_sha256: str
    package_signature: str
    state: str
    reason: str
    created_s: float
    started_s: float | None
    finished_s: float | None
    values_sha256: str
    optimizer_sha256: str | None
    next_round: int
    committed: int
    abandoned_in_a_row: int
    average_sha256: str | None
    reference_sha256: str | None
    phase: str
    visit_rounds: int
    delta_sizes: str
    paused_s: float | None

    @property
    def rounds_done(self) -> int:
        """Number of committed rounds, those of visits among them."""
        return self.committed + self.visit_rounds


def find(connection: Connection, run_id: str) -> RunRow | None:
    """The run with this id."""
    row = connection.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    return None if row is None else RunRow(**row)


def get(connection: Connection, run_id: str) -> RunRow:
    """The run with this id, which must exist; :class:`LookupError` if it does not."""
    row = find(connection, run_id)
    if row is None:
        raise LookupError(f"no run {run_id} in the database")
    return row


def find_newest(connection: Connection) -> RunRow | None:
    """The run that was created last."""
    row = connection.execute("SELECT * FROM runs ORDER BY position DESC LIMIT 1").fetchone()
    return None if row is None else RunRow(**row)


def active(connection: Connection) -> list[RunRow]:
    """Runs that are training or await their last evaluation, oldest first."""
    rows = connection.execute("SELECT * FROM runs WHERE state IN ('running', 'evaluating') ORDER BY position")
    return [RunRow(**row) for row in rows]


def in_turn(connection: Connection) -> list[str]:
    """Ids of the runs that are training: first the one whose last round opened longest ago, or which has none."""
    rows = connection.execute(
        "SELECT run_id FROM runs LEFT JOIN rounds USING (run_id) WHERE runs.state = 'running'"
        " GROUP BY run_id, position ORDER BY coalesce(max(opened_s), 0), position"
    )
    return [str(row["run_id"]) for row in rows]


def first_queued(connection: Connection) -> RunRow | None:
    """The run whose turn is next."""
    row = connection.execute("SELECT * FROM runs WHERE state = 'queued' ORDER BY position LIMIT 1").fetchone()
    return None if row is None else RunRow(**row)


def has_begun_any(connection: Connection) -> bool:
    """Whether any run has ever begun."""
    return connection.execute("SELECT 1 FROM runs WHERE state != 'queued'").fetchone() is not None


def all_runs(connection: Connection) -> list[RunRow]:
    """All runs, oldest first."""
    return [RunRow(**row) for row in connection.execute("SELECT * FROM runs ORDER BY position")]


def newest(connection: Connection, *, before: int, limit: int) -> list[RunRow]:
    """Runs whose place in the queue is below ``before``, newest first, at most ``limit``."""
    rows = connection.execute(
        "SELECT * FROM runs WHERE position < ? ORDER BY position DESC LIMIT ?", (before, limit)
    )
    return [RunRow(**row) for row in rows]


def add(
    connection: Connection,
    run_id: str,
    *,
    config: str,
    package_sha256: str,
    package_signature: str,
    values_sha256: str,
    created_s: float,
    phase: str = "training",
    optimizer_sha256: str | None = None,
) -> None:
    """Put a run at the end of the queue."""
    connection.execute(
        "INSERT INTO runs (run_id, config, package_sha256, package_signature, state, created_s,"
        " values_sha256, phase, optimizer_sha256) VALUES (?, ?, ?, ?, 'queued', ?, ?, ?, ?)",
        (
            run_id,
            config,
            package_sha256,
            package_signature,
            created_s,
            values_sha256,
            phase,
            optimizer_sha256,
        ),
    )


def has_state(connection: Connection, optimizer_sha256: str) -> bool:
    """Whether some run's server state is this one."""
    found = connection.execute("SELECT 1 FROM runs WHERE optimizer_sha256 = ? LIMIT 1", (optimizer_sha256,))
    return found.fetchone() is not None


def start(connection: Connection, run_id: str, *, started_s: float) -> None:
    """Let a run begin, if it is still queued."""
    connection.execute(
        "UPDATE runs SET state = 'running', started_s = ? WHERE run_id = ? AND state = 'queued'",
        (started_s, run_id),
    )


def set_values(connection: Connection, run_id: str, values_sha256: str) -> None:
    """Let a run go on from, or end with, other values."""
    connection.execute("UPDATE runs SET values_sha256 = ? WHERE run_id = ?", (values_sha256, run_id))


def set_phase(connection: Connection, run_id: str, phase: str) -> None:
    """Let a run go on to its next phase."""
    connection.execute("UPDATE runs SET phase = ? WHERE run_id = ?", (phase, run_id))


def commit_visit(connection: Connection, run_id: str, *, values_sha256: str, optimizer_sha256: str) -> None:
    """Store what a round of a visit came to; the count of abandoned rounds begins anew."""
    connection.execute(
        "UPDATE runs SET values_sha256 = ?, optimizer_sha256 = ?, visit_rounds = visit_rounds + 1,"
        " abandoned_in_a_row = 0 WHERE run_id = ?",
        (values_sha256, optimizer_sha256, run_id),
    )


def set_next_round(connection: Connection, run_id: str, number: int) -> None:
    """Say which round opens next."""
    connection.execute("UPDATE runs SET next_round = ? WHERE run_id = ?", (number, run_id))


def commit(
    connection: Connection,
    run_id: str,
    *,
    values_sha256: str,
    optimizer_sha256: str,
    average_sha256: str | None,
    reference_sha256: str | None,
    committed: int,
) -> None:
    """Store what a committed round came to; the count of abandoned rounds begins anew."""
    connection.execute(
        "UPDATE runs SET values_sha256 = ?, optimizer_sha256 = ?, average_sha256 = ?, reference_sha256 = ?,"
        " committed = ?, abandoned_in_a_row = 0 WHERE run_id = ?",
        (values_sha256, optimizer_sha256, average_sha256, reference_sha256, committed, run_id),
    )


def set_paused(connection: Connection, run_id: str, at_s: float | None) -> None:
    """Remember when a run was paused; None lets it go on."""
    connection.execute("UPDATE runs SET paused_s = ? WHERE run_id = ?", (at_s, run_id))


def set_delta_sizes(connection: Connection, run_id: str, sizes: Mapping[str, float]) -> None:
    """Store the sizes that deltas were last seen with, by slice."""
    connection.execute(
        "UPDATE runs SET delta_sizes = ? WHERE run_id = ?", (json.dumps(dict(sizes), sort_keys=True), run_id)
    )


def set_abandoned_in_a_row(connection: Connection, run_id: str, count: int) -> None:
    """Store how many rounds were abandoned since the last commit."""
    connection.execute("UPDATE runs SET abandoned_in_a_row = ? WHERE run_id = ?", (count, run_id))


def await_evaluation(connection: Connection, run_id: str) -> None:
    """Mark a run as trained to its end, with evaluations to come."""
    connection.execute("UPDATE runs SET state = 'evaluating' WHERE run_id = ?", (run_id,))


def end(connection: Connection, run_id: str, *, state: str, reason: str, finished_s: float) -> None:
    """Store how a run ended."""
    connection.execute(
        "UPDATE runs SET state = ?, reason = ?, finished_s = ? WHERE run_id = ?",
        (state, reason, finished_s, run_id),
    )
