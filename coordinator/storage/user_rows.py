"""Rows of ``users`` and ``sessions``: who may sign in, and who has."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.storage.connection import Connection


@dataclass(frozen=True)
class UserRow:
    """A user.

    Attributes:
        name: name of the user.
        role: viewer, operator or admin.
        password: hash of the password, with parameters and salt; None if the user has none.
        token_sha256: digest of the user's token; None if the user has none.
        created_s: moment when the user was added.
    """

    name: str
    role: str
    password: str | None
    token_sha256: str | None
    created_s: float


@dataclass(frozen=True)
class SessionRow:
    """A session.

    Attributes:
        name: name of the user, or of the admin token.
        credential: digest of the password's hash or of the token that it was opened with.
        csrf: what every form of the session carries.
        expires_s: moment when it ends.
    """

    name: str
    credential: str
    csrf: str
    expires_s: float


def add(connection: Connection, user: UserRow) -> bool:
    """Add a user; False, with nothing changed, if the name is taken."""
    added = connection.execute(
        "INSERT INTO users VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (user.name, user.role, user.password, user.token_sha256, user.created_s),
    )
    return added.rowcount > 0


def find(connection: Connection, name: str) -> UserRow | None:
    """The user of this name."""
    row = connection.execute("SELECT * FROM users WHERE name = ?", (name,)).fetchone()
    return None if row is None else UserRow(**row)


def find_by_token(connection: Connection, token_sha256: str) -> UserRow | None:
    """The user whose token has this digest."""
    row = connection.execute("SELECT * FROM users WHERE token_sha256 = ?", (token_sha256,)).fetchone()
    return None if row is None else UserRow(**row)


def all_users(connection: Connection) -> list[UserRow]:
    """All users, by name."""
    return [UserRow(**row) for row in connection.execute("SELECT * FROM users ORDER BY name")]


def remove(connection: Connection, name: str) -> bool:
    """Remove a user with all sessions; False if there is none."""
    connection.execute("DELETE FROM sessions WHERE name = ?", (name,))
    return connection.execute("DELETE FROM users WHERE name = ?", (name,)).rowcount > 0


def add_session(connection: Connection, session_sha256: str, session: SessionRow) -> None:
    """Keep a session, known by its digest alone."""
    connection.execute(
        "INSERT INTO sessions VALUES (?, ?, ?, ?, ?)",
        (session_sha256, session.name, session.credential, session.csrf, session.expires_s),
    )


def find_session(connection: Connection, session_sha256: str) -> SessionRow | None:
    """The session with this digest."""
    row = connection.execute(
        "SELECT name, credential, csrf, expires_s FROM sessions WHERE session_sha256 = ?", (session_sha256,)
    ).fetchone()
    return None if row is None else SessionRow(**row)


def end_session(connection: Connection, session_sha256: str) -> None:
    """Forget a session."""
    connection.execute("DELETE FROM sessions WHERE session_sha256 = ?", (session_sha256,))


def forget_sessions(connection: Connection, before_s: float) -> None:
    """Forget the sessions that ended before this moment."""
    connection.execute("DELETE FROM sessions WHERE expires_s < ?", (before_s,))
