"""Rows of ``rounds``. A round is open until it is committed or abandoned; a run has one open round at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class RoundRow:
    """A round as it is stored.

    Attributes:
        run_id: id of its run.
        round: its number, from 0.
        state: selecting, collecting, aggregating, committed or abandoned.
        reason: why it was abandoned; empty otherwise.
        opened_s: moment when it opened.
        deadline_s: moment when it closes with the results that are in, if they are enough.
        closed_s: moment when it closed; None while it is open.
        values_sha256: slice values that it started from.
        bytes_up: body bytes that devices sent while it was open.
        bytes_down: body bytes that devices got while it was open.
        gated: 1 if it was committed and left the values as they were, else 0.
        phase: phase of the run that it belongs to: training, first_visit or last_visit.
        rolled_back_s: moment when the operator took it back; None if it counts.
    """

    run_id: str
    round: int
    state: str
    reason: str
    opened_s: float
    deadline_s: float
    closed_s: float | None
    values_sha256: str
    bytes_up: int
    bytes_down: int
    gated: int
    phase: str
    rolled_back_s: float | None


def find_open(connection: Connection, run_id: str) -> RoundRow | None:
    """The run's open round."""
    row = connection.execute(
        "SELECT * FROM rounds WHERE run_id = ? AND state IN ('selecting', 'collecting', 'aggregating')",
        (run_id,),
    ).fetchone()
    return None if row is None else RoundRow(**row)


def all_rounds(connection: Connection, run_id: str) -> list[RoundRow]:
    """All rounds of a run, in order."""
    rows = connection.execute("SELECT * FROM rounds WHERE run_id = ? ORDER BY round", (run_id,))
    return [RoundRow(**row) for row in rows]


def newest_rounds(connection: Connection, run_id: str, *, before: int, limit: int) -> list[RoundRow]:
    """Rounds of a run with a number below ``before``, newest first, at most ``limit``."""
    rows = connection.execute(
        "SELECT * FROM rounds WHERE run_id = ? AND round < ? ORDER BY round DESC LIMIT ?",
        (run_id, before, limit),
    )
    return [RoundRow(**row) for row in rows]


def last_committed(connection: Connection, run_id: str, phase: str | None = None) -> int | None:
    """Number of the run's newest committed round that counts, or of that of a phase; None if there is none."""
    number: int | None = connection.execute(
        "SELECT max(round) FROM rounds WHERE run_id = ? AND state = 'committed' AND rolled_back_s IS NULL"
        " AND phase = coalesce(?, phase)",
        (run_id, phase),
    ).fetchone()[0]
    return number


def add(
    connection: Connection,
    run_id: str,
    number: int,
    *,
    opened_s: float,
    deadline_s: float,
    values_sha256: str,
    phase: str = "training",
) -> None:
    """Open a round, selecting."""
    connection.execute(
        "INSERT INTO rounds (run_id, round, state, opened_s, deadline_s, values_sha256, phase)"
        " VALUES (?, ?, 'selecting', ?, ?, ?, ?)",
        (run_id, number, opened_s, deadline_s, values_sha256, phase),
    )


def set_state(connection: Connection, run_id: str, number: int, state: str) -> None:
    """Move an open round on to ``collecting`` or ``aggregating``."""
    connection.execute("UPDATE rounds SET state = ? WHERE run_id = ? AND round = ?", (state, run_id, number))


def commit(connection: Connection, run_id: str, number: int, *, closed_s: float, gated: bool) -> None:
    """Close a round as committed; ``gated`` is whether it left the values as they were."""
    connection.execute(
        "UPDATE rounds SET state = 'committed', closed_s = ?, gated = ? WHERE run_id = ? AND round = ?",
        (closed_s, gated, run_id, number),
    )


def abandon(connection: Connection, run_id: str, number: int, *, reason: str, closed_s: float) -> None:
    """Close a round as abandoned."""
    connection.execute(
        "UPDATE rounds SET state = 'abandoned', reason = ?, closed_s = ? WHERE run_id = ? AND round = ?",
        (reason, closed_s, run_id, number),
    )


def abandon_open(connection: Connection, run_id: str, *, reason: str, closed_s: float) -> None:
    """Close the run's open round as abandoned, if there is one."""
    connection.execute(
        "UPDATE rounds SET state = 'abandoned', reason = ?, closed_s = ?"
        " WHERE run_id = ? AND state IN ('selecting', 'collecting', 'aggregating')",
        (reason, closed_s, run_id),
    )


def roll_back(connection: Connection, run_id: str, to: int, *, at_s: float) -> int:
    """Take back the run's rounds after ``to``, and return how many counted until now."""
    taken_back = connection.execute(
        "UPDATE rounds SET rolled_back_s = ? WHERE run_id = ? AND round > ? AND rolled_back_s IS NULL",
        (at_s, run_id, to),
    )
    return taken_back.rowcount


def extend_deadline(connection: Connection, run_id: str, until_s: float) -> None:
    """Give the run's open round until this moment at least, unless it is aggregating already."""
    connection.execute(
        "UPDATE rounds SET deadline_s = ?"
        " WHERE run_id = ? AND state IN ('selecting', 'collecting') AND deadline_s < ?",
        (until_s, run_id, until_s),
    )


def move_open(connection: Connection, by_s: float) -> None:
    """Move all moments of open rounds and of their open tasks by so many seconds."""
    connection.execute(
        "UPDATE rounds SET opened_s = opened_s + ?, deadline_s = deadline_s + ?"
        " WHERE state IN ('selecting', 'collecting', 'aggregating')",
        (by_s, by_s),
    )
    connection.execute(
        "UPDATE tasks SET reserved_s = reserved_s + ?, due_s = due_s + ?, alive_by_s = alive_by_s + ?"
        " WHERE state IN ('reserved', 'working')",
        (by_s, by_s, by_s),
    )


def add_bytes_of(connection: Connection, passed: Mapping[str, tuple[int, int]]) -> None:
    """Count body bytes to open rounds; what passes while none is open belongs to no round.

    Where several runs have one, the bytes of a device belong to the run that it last worked for.

    Args:
        connection: connection with a transaction under way.
        passed: bytes up and down by device; those of nobody in particular under the empty name.
    """
    count = connection.execute(
        "SELECT count(*) FROM rounds WHERE state IN ('selecting', 'collecting', 'aggregating')"
    ).fetchone()[0]
    if count <= 1:
        up_bytes, down_bytes = (sum(each) for each in zip(*passed.values(), strict=True))
        add_bytes(connection, up_bytes=up_bytes, down_bytes=down_bytes)
        return
    connection.executemany(
        "UPDATE rounds SET bytes_up = bytes_up + ?, bytes_down = bytes_down + ?"
        " WHERE state IN ('selecting', 'collecting', 'aggregating') AND run_id ="
        " (SELECT run_id FROM tasks WHERE device_id = ? ORDER BY reserved_s DESC LIMIT 1)",
        [(up_bytes, down_bytes, device_id) for device_id, (up_bytes, down_bytes) in passed.items()],
    )


def add_bytes(connection: Connection, *, up_bytes: int, down_bytes: int) -> None:
    """Count body bytes to the open round; what passes while none is open belongs to no round."""
    connection.execute(
        "UPDATE rounds SET bytes_up = bytes_up + ?, bytes_down = bytes_down + ?"
        " WHERE state IN ('selecting', 'collecting', 'aggregating')",
        (up_bytes, down_bytes),
    )
