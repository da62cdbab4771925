"""Figures over the whole database, counted by the database itself, so that a scrape costs little in a large fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class OpenRun:
    """A run that has not ended, as monitoring sees it.

    Attributes:
        run_id: id of the run.
        name: name that its configuration gives it.
        state: queued, running or evaluating.
        paused: 1 if the operator paused it, else 0.
        committed: number of committed rounds.
        abandoned_in_a_row: number of rounds abandoned since the last commit.
        accuracy: share of right predictions at its newest evaluation; None before the first.
        mean_loss: mean loss at its newest evaluation; None before the first.
    """

    run_id: str
    name: str
    state: str
    paused: int
    committed: int
    abandoned_in_a_row: int
    accuracy: float | None
    mean_loss: float | None


@dataclass(frozen=True)
class Figures:
    """What the database says at one moment.

    Attributes:
        devices: number of devices by class and state: revoked, never seen, silent, not eligible, working, asked, ready.
        not_eligible: number of devices that may not work now, by the reason that they told.
        runs: number of runs by state.
        rounds: number of rounds by state.
        lapsed: number of tasks that came to nothing, by reason.
        tasks: number of tasks by state.
        bytes_up: body bytes that devices sent in rounds.
        bytes_down: body bytes that devices got in rounds.
        releases: number of releases.
        open_runs: runs that have not ended, in turn.
    """

    devices: Mapping[tuple[str, str], int]
    not_eligible: Mapping[str, int]
    runs: Mapping[str, int]
    rounds: Mapping[str, int]
    lapsed: Mapping[str, int]
    tasks: Mapping[str, int]
    bytes_up: int
    bytes_down: int
    releases: int
    open_runs: tuple[OpenRun, ...]


def figures(connection: Connection, *, now_s: float, slack_s: float) -> Figures:
    """What the database says now.

    Args:
        connection: connection to the database; nothing is written.
        now_s: the present moment, in seconds since 1970.
        slack_s: how long after the moment when it was expected a device is still not silent.
    """
    up, down = connection.execute(
        "SELECT coalesce(sum(bytes_up), 0) AS up, coalesce(sum(bytes_down), 0) AS down FROM rounds"
    ).fetchone()
    return Figures(
        devices=_devices(connection, now_s - slack_s),
        not_eligible=_counts(
            connection,
            "SELECT not_eligible, count(*) FROM devices WHERE revoked_s IS NULL AND not_eligible != '' GROUP BY 1",
        ),
        runs=_counts(connection, "SELECT state, count(*) FROM runs GROUP BY 1"),
        rounds=_counts(connection, "SELECT state, count(*) FROM rounds GROUP BY 1"),
        lapsed=_counts(connection, "SELECT reason, count(*) FROM tasks WHERE state = 'lapsed' GROUP BY 1"),
        tasks=_counts(connection, "SELECT state, count(*) FROM tasks GROUP BY 1"),
        bytes_up=int(up),
        bytes_down=int(down),
        releases=int(connection.execute("SELECT count(*) FROM releases").fetchone()[0]),
        open_runs=_open_runs(connection),
    )


def _devices(connection: Connection, expected_since_s: float) -> dict[tuple[str, str], int]:
    rows = connection.execute(
        "SELECT class, CASE"
        " WHEN revoked_s IS NOT NULL THEN 'revoked'"
        " WHEN seen_s IS NULL THEN 'never seen'"
        " WHEN held = 2 THEN 'working'"
        " WHEN held = 1 THEN 'asked'"
        " WHEN coalesce(expected_s, seen_s) < ? THEN 'silent'"
        " WHEN not_eligible != '' THEN 'not eligible'"
        " ELSE 'ready' END AS standing, count(*)"
        " FROM devices LEFT JOIN (SELECT device_id AS holder,"
        " max(CASE state WHEN 'working' THEN 2 ELSE 1 END) AS held"
        " FROM tasks WHERE state IN ('reserved', 'working') GROUP BY device_id) AS holding ON holder = device_id"
        " GROUP BY 1, 2",
        (expected_since_s,),
    )
    return {(str(kind), str(state)): int(count) for kind, state, count in rows}


def _counts(connection: Connection, query: str) -> dict[str, int]:
    return {str(word): int(count) for word, count in connection.execute(query)}


def _open_runs(connection: Connection) -> tuple[OpenRun, ...]:
    rows = connection.execute(
        "SELECT run_id, config, state, CASE WHEN paused_s IS NULL THEN 0 ELSE 1 END AS paused, committed,"
        " abandoned_in_a_row,"
        " (SELECT accuracy FROM evaluations AS e WHERE e.run_id = r.run_id AND e.state = 'done'"
        "  ORDER BY round DESC LIMIT 1) AS accuracy,"
        " (SELECT mean_loss FROM evaluations AS e WHERE e.run_id = r.run_id AND e.state = 'done'"
        "  ORDER BY round DESC LIMIT 1) AS mean_loss"
        " FROM runs AS r WHERE state IN ('queued', 'running', 'evaluating') ORDER BY position"
    )
    found = []
    for row in rows:
        kept = {name: row[name] for name in OpenRun.__dataclass_fields__ if name != "name"}
        found.append(OpenRun(name=msgspec.json.decode(row["config"], type=_Named).name, **kept))
    return tuple(found)


class _Named(Struct):
    """What is read of a run's configuration."""

    name: str = ""
