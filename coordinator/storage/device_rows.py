"""Rows of ``devices`` and ``nonces``: who is enrolled, what each device last said of itself, its used nonces."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection, Row


@dataclass(frozen=True)
class DeviceRow:
    """An enrolled device, as far as its requests are judged by it.

    Attributes:
        device_id: random id of the device.
        name: name that the operator gave it.
        public_key: key that its requests are signed with.
        revoked_s: moment when the operator revoked it; None if it is not revoked.
    """

    device_id: str
    name: str
    public_key: str
    revoked_s: float | None


@dataclass(frozen=True)
class SeenDevice:
    """A device that checked in lately.

    Attributes:
        device_id: random id of the device.
        name: name that the operator gave it.
        cap_bytes: memory that it granted at its last check-in.
        seen_s: moment of its last check-in.
        expected_s: moment by which it was told then to check in again.
        example_count: number of rows of its data, as it said then.
    """

    device_id: str
    name: str
    cap_bytes: int
    seen_s: float
    expected_s: float
    example_count: int = 0


def find(connection: Connection, device_id: str) -> DeviceRow | None:
    """The device with this id, revoked or not."""
    row = connection.execute(
        "SELECT device_id, name, public_key, revoked_s FROM devices WHERE device_id = ?", (device_id,)
    ).fetchone()
    return None if row is None else DeviceRow(**row)


def find_unrevoked(connection: Connection, name_or_id: str) -> DeviceRow | None:
    """The device with this name or id, unless it was revoked."""
    row = connection.execute(
        "SELECT device_id, name, public_key, revoked_s FROM devices"
        " WHERE (name = ? OR device_id = ?) AND revoked_s IS NULL",
        (name_or_id, name_or_id),
    ).fetchone()
    return None if row is None else DeviceRow(**row)


def all_devices(connection: Connection, device_id: str | None = None) -> list[Row]:
    """Every device that ever enrolled, by name, or the one with an id.

    Returns:
        rows of device_id, name, device_class, enrolled_s, revoked_s, seen_s, cap_bytes, example_count, floor_bytes,
        runtime_version, expected_s and not_eligible.
    """
    one, asked = ("", ()) if device_id is None else (" WHERE device_id = ?", (device_id,))
    return connection.execute(
        "SELECT device_id, name, class AS device_class, enrolled_s, revoked_s, seen_s, cap_bytes, example_count,"  # noqa: S608
        " floor_bytes, runtime_version, coalesce(expected_s, seen_s) AS expected_s, not_eligible"
        f" FROM devices{one} ORDER BY name, enrolled_s",
        asked,
    ).fetchall()


def count_enrolled(connection: Connection) -> int:
    """Number of devices that are enrolled and not revoked."""
    return int(connection.execute("SELECT count(*) FROM devices WHERE revoked_s IS NULL").fetchone()[0])


def not_set_aside(connection: Connection, run_id: str) -> list[SeenDevice]:
    """Devices that have checked in, take tasks and may work now, are not revoked, and not set aside by a run."""
    rows = connection.execute(
        "SELECT device_id, name, cap_bytes, seen_s, coalesce(expected_s, seen_s) AS expected_s, example_count"
        " FROM devices WHERE revoked_s IS NULL AND seen_s IS NOT NULL AND trains != 0 AND not_eligible = ''"
        " AND device_id NOT IN (SELECT device_id FROM set_aside WHERE run_id = ?)",
        (run_id,),
    )
    return [SeenDevice(**row) for row in rows]


def count_not_eligible(connection: Connection) -> dict[str, int]:
    """Number of devices that might not work when they last checked in, by their reason."""
    rows = connection.execute(
        "SELECT not_eligible, count(*) FROM devices WHERE revoked_s IS NULL AND trains != 0 AND not_eligible != ''"
        " GROUP BY not_eligible ORDER BY not_eligible"
    )
    return {str(reason): int(count) for reason, count in rows}


def not_eligible(connection: Connection, device_id: str) -> str:
    """Why a device said at its last check-in that it may not work; empty if it may."""
    row = connection.execute("SELECT not_eligible FROM devices WHERE device_id = ?", (device_id,)).fetchone()
    return "" if row is None else str(row["not_eligible"])


def versions_in(connection: Connection, run_id: str) -> list[str]:
    """Versions of the program on the devices whose results counted in a run, each once."""
    rows = connection.execute(
        "SELECT DISTINCT runtime_version FROM devices JOIN tasks USING (device_id)"
        " WHERE run_id = ? AND state = 'counted' AND runtime_version IS NOT NULL ORDER BY runtime_version",
        (run_id,),
    )
    return [str(row["runtime_version"]) for row in rows]


def last_check_in_s(connection: Connection) -> float | None:
    """When any device last checked in; None if none ever did."""
    seen_s: float | None = connection.execute("SELECT max(seen_s) FROM devices").fetchone()[0]
    return seen_s


def add(
    connection: Connection,
    device_id: str,
    *,
    name: str,
    device_class: str,
    public_key: str,
    enrolled_s: float,
) -> bool:
    """Enrol a device; False, with nothing changed, if a device that is not revoked has its name."""
    added = connection.execute(
        "INSERT INTO devices (device_id, name, class, public_key, enrolled_s) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING",
        (device_id, name, device_class, public_key, enrolled_s),
    )
    return added.rowcount > 0


def revoke(connection: Connection, device_id: str, *, revoked_s: float) -> None:
    """Mark a device as revoked, which frees its name."""
    connection.execute("UPDATE devices SET revoked_s = ? WHERE device_id = ?", (revoked_s, device_id))


def note_check_in(
    connection: Connection,
    device_id: str,
    *,
    seen_s: float,
    cap_bytes: int,
    floor_bytes: int,
    example_count: int,
    runtime_version: str,
    setup: str,
    trains: bool,
    release: int,
    not_eligible: str,
) -> None:
    """Remember what a device said of itself at its check-in."""
    connection.execute(
        "UPDATE devices SET seen_s = ?, cap_bytes = ?, floor_bytes = ?, example_count = ?,"
        " runtime_version = ?, setup = ?, trains = ?, release = ?, not_eligible = ? WHERE device_id = ?",
        (
            *(seen_s, cap_bytes, floor_bytes, example_count),
            *(runtime_version, setup, trains, release, not_eligible, device_id),
        ),
    )


def expect(connection: Connection, device_id: str, by_s: float) -> None:
    """Remember by when a device was told to check in again."""
    connection.execute("UPDATE devices SET expected_s = ? WHERE device_id = ?", (by_s, device_id))


def expect_live(connection: Connection, *, since_s: float, by_s: float) -> None:
    """Expect the devices that are not overdue since ``since_s`` by another moment, where that is later."""
    connection.execute(
        "UPDATE devices SET expected_s = ? WHERE expected_s >= ? AND expected_s < ?", (by_s, since_s, by_s)
    )


def setup_of(connection: Connection, device_id: str) -> str:
    """What a device last said of its setup; an older one that tells no digest is known by its version and cap."""
    row = connection.execute(
        "SELECT setup, runtime_version, cap_bytes FROM devices WHERE device_id = ?", (device_id,)
    ).fetchone()
    return f"{row['setup']} {row['runtime_version']} {row['cap_bytes']}"


def note_resumed(connection: Connection, device_id: str, *, at_s: float) -> None:
    """Remember when a device was last taken up again: what it failed before does not count any more."""
    connection.execute("UPDATE devices SET resumed_s = ? WHERE device_id = ?", (at_s, device_id))


def move_check_ins(connection: Connection, by_s: float) -> None:
    """Move the last check-in of every device, and the one that is expected, by so many seconds."""
    connection.execute("UPDATE devices SET seen_s = seen_s + ?, expected_s = expected_s + ?", (by_s, by_s))


def use_nonce(connection: Connection, device_id: str, nonce: str, *, expires_s: float) -> bool:
    """Use up a nonce of a device; False if it was used before."""
    added = connection.execute(
        "INSERT INTO nonces VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (device_id, nonce, expires_s)
    )
    return added.rowcount > 0


def forget_nonces(connection: Connection, before_s: float) -> None:
    """Forget the nonces that expired before this moment, and remember up to which expiry that was."""
    last_s = connection.execute(
        "SELECT max(expires_s) FROM nonces WHERE expires_s < ?", (before_s,)
    ).fetchone()[0]
    if last_s is None:
        return
    connection.execute("DELETE FROM nonces WHERE expires_s <= ?", (last_s,))
    refuse_nonces(connection, until_s=last_s)


def refuse_nonces(connection: Connection, *, until_s: float) -> None:
    """Take none that expires by this moment: whether it was used before is not known."""
    connection.execute(
        "INSERT INTO marks VALUES ('nonces_forgotten_to_s', ?)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE marks.value < excluded.value",
        (until_s,),
    )


def nonces_forgotten_to_s(connection: Connection) -> float:
    """The latest expiry of a nonce that was forgotten: what would expire by then may have been seen before."""
    row = connection.execute("SELECT value FROM marks WHERE name = 'nonces_forgotten_to_s'").fetchone()
    return 0.0 if row is None else float(row[0])


def public_key(connection: Connection, device_id: str) -> str:
    """The key that a device enrolled with."""
    row = connection.execute("SELECT public_key FROM devices WHERE device_id = ?", (device_id,)).fetchone()
    return str(row["public_key"])
