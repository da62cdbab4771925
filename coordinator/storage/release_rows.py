"""Rows of ``releases`` and ``published_runs``: values that devices are to use."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class Limits:
    """What a device's own check must find before it uses a release.

    Attributes:
        lowest_accuracy: least share of right predictions; None asks for none.
        highest_loss: largest mean cross-entropy; None asks for none.
    """

    lowest_accuracy: float | None
    highest_loss: float | None


@dataclass(frozen=True)
class ReleaseRow:
    """A release as it is stored.

    Attributes:
        number: its number; higher ones are newer.
        run_id: id of the run that made the values.
        round: number of the round after which they stood.
        values_sha256: the values.
        lowest_accuracy: see :class:`Limits`.
        highest_loss: see :class:`Limits`.
        published_s: moment when it was published.
    """

    number: int
    run_id: str
    round: int
    values_sha256: str
    lowest_accuracy: float | None
    highest_loss: float | None
    published_s: float


def add(
    connection: Connection,
    run_id: str,
    round_number: int,
    values_sha256: str,
    limits: Limits,
    *,
    published_s: float,
) -> ReleaseRow:
    """Publish values under the next number."""
    (row,) = connection.execute(
        "INSERT INTO releases (run_id, round, values_sha256, lowest_accuracy, highest_loss, published_s)"
        " VALUES (?, ?, ?, ?, ?, ?) RETURNING *",
        (run_id, round_number, values_sha256, limits.lowest_accuracy, limits.highest_loss, published_s),
    ).fetchall()
    return ReleaseRow(**row)


def newest(connection: Connection) -> ReleaseRow | None:
    """The release with the highest number."""
    row = connection.execute("SELECT * FROM releases ORDER BY number DESC LIMIT 1").fetchone()
    return None if row is None else ReleaseRow(**row)


def all_releases(connection: Connection) -> list[ReleaseRow]:
    """Every release, oldest first."""
    return [ReleaseRow(**row) for row in connection.execute("SELECT * FROM releases ORDER BY number")]


def publish_each_round(connection: Connection, run_id: str, limits: Limits) -> None:
    """Let each further committed round of a run become a release; new limits replace earlier ones."""
    connection.execute(
        "INSERT INTO published_runs VALUES (?, ?, ?) ON CONFLICT (run_id) DO UPDATE"
        " SET lowest_accuracy = excluded.lowest_accuracy, highest_loss = excluded.highest_loss",
        (run_id, limits.lowest_accuracy, limits.highest_loss),
    )


def limits_of_each_round(connection: Connection, run_id: str) -> Limits | None:
    """The limits under which a run's rounds become releases; None if they do not."""
    row = connection.execute(
        "SELECT lowest_accuracy, highest_loss FROM published_runs WHERE run_id = ?", (run_id,)
    ).fetchone()
    return None if row is None else Limits(**row)


def devices_at(connection: Connection, number: int) -> int:
    """Number of devices that have decided about a release or a newer one."""
    count: int = connection.execute(
        "SELECT count(*) FROM devices WHERE revoked_s IS NULL AND release >= ?", (number,)
    ).fetchone()[0]
    return count
