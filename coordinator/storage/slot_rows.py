"""Rows of ``slots``: what each slot of a round trains, whichever device holds it. The names include the head's."""

from __future__ import annotations

import json
from collections.abc import Sequence

from coordinator.storage.connection import Connection


def add(connection: Connection, run_id: str, number: int, slot: int, slices: Sequence[str]) -> None:
    """Store what a slot of a round was dealt."""
    connection.execute("INSERT INTO slots VALUES (?, ?, ?, ?)", (run_id, number, slot, json.dumps(slices)))


def count(connection: Connection, run_id: str, number: int) -> int:
    """Number of slots of a round."""
    return int(
        connection.execute(
            "SELECT count(*) FROM slots WHERE run_id = ? AND round = ?", (run_id, number)
        ).fetchone()[0]
    )


def dealt(connection: Connection, run_id: str, number: int) -> list[tuple[str, ...]]:
    """What each slot of a round was dealt, in the order of the slots."""
    rows = connection.execute(
        "SELECT slices FROM slots WHERE run_id = ? AND round = ? ORDER BY slot", (run_id, number)
    )
    return [tuple(json.loads(row["slices"])) for row in rows]


def vacant(connection: Connection, run_id: str, number: int) -> list[int]:
    """Slots of a round that no device holds and none has a counted result for, in order."""
    rows = connection.execute(
        "SELECT slot FROM slots WHERE run_id = ? AND round = ? AND slot NOT IN"
        " (SELECT slot FROM tasks WHERE run_id = ? AND round = ? AND state != 'lapsed') ORDER BY slot",
        (run_id, number, run_id, number),
    )
    return [row["slot"] for row in rows]
