"""Rows of ``tokens``: one-time tokens for enrolling, known by their sha256 alone."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class TokenRow:
    """An enrolment token.

    Attributes:
        expires_s: moment when it expires.
        device_id: id of the device that used it up; None while nobody has.
    """

    expires_s: float
    device_id: str | None


def add(connection: Connection, token_sha256: str, *, expires_s: float) -> None:
    """Keep a fresh token."""
    connection.execute("INSERT INTO tokens VALUES (?, ?, NULL)", (token_sha256, expires_s))


def find(connection: Connection, token_sha256: str) -> TokenRow | None:
    """The token with this digest."""
    row = connection.execute(
        "SELECT expires_s, device_id FROM tokens WHERE token_sha256 = ?", (token_sha256,)
    ).fetchone()
    return None if row is None else TokenRow(**row)


def use(connection: Connection, token_sha256: str, device_id: str) -> None:
    """Use up a token for a device."""
    connection.execute("UPDATE tokens SET device_id = ? WHERE token_sha256 = ?", (device_id, token_sha256))
