"""People: users with roles, their passwords and tokens, and sessions of the dashboard.

A user signs in by a password or by a token; commands and programs use the token alone. The token of the state folder
(``admin.token``) is an admin without a name. Passwords are kept as scrypt (RFC 7914), tokens and sessions as digests:
they are random already.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Literal

from coordinator.auth import ADMIN_TOKEN
from coordinator.refusals import ConflictError, NotFoundError, UnauthenticatedError
from coordinator.storage import user_rows
from coordinator.storage.connection import Connection
from coordinator.storage.user_rows import SessionRow, UserRow

Role = Literal["viewer", "operator", "admin"]
#: Each role may do what those before it may.
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")
#: Bounds of a password's length in characters.
LEAST_PASSWORD, MOST_PASSWORD = 12, 256
SESSION_S = 12 * 3600.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
#: Cost of scrypt: 32 MiB of memory, and about a tenth of a second.
_N, _R, _P = 1 << 15, 8, 1


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        name: name of the user; ``admin.token`` for whoever has that.
        role: role of the user.
    """

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether the user has the rights of a role."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Session:
    """A session of the dashboard that is going on.

    Attributes:
        principal: whose it is.
        csrf: what every form of it carries.
    """

    principal: Principal
    csrf: str


def hash_password(password: str) -> str:
    """A password as it is kept: scrypt with its parameters and a salt of its own."""
    salt = secrets.token_bytes(16)
    return f"scrypt${_N}${_R}${_P}${salt.hex()}${_scrypt(password, salt, _N, _R, _P).hex()}"


def is_password(password: str, kept: str) -> bool:
    """Whether a password is the one that was kept; takes a tenth of a second and 32 MiB."""
    _, n, r, p, salt, digest = kept.split("$")
    found = _scrypt(password, bytes.fromhex(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, bytes.fromhex(digest))


@cache
def nobodys_password() -> str:
    """What the password of an unknown user is compared with, so that the answer takes as long."""
    return hash_password(secrets.token_hex(16))


def name_fault(name: str) -> str | None:
    """What is wrong with the name of a new user; None if nothing is."""
    if _NAME.fullmatch(name):
        return None
    return "a user's name has 1 to 64 letters, digits, '.', '_', '@' and '-', and begins with a letter or a digit"


def password_fault(password: str) -> str | None:
    """What is wrong with a new password; None if nothing is."""
    if LEAST_PASSWORD <= len(password) <= MOST_PASSWORD:
        return None
    return f"a password has {LEAST_PASSWORD} to {MOST_PASSWORD} characters, this one has {len(password)}"


def add_user(
    connection: Connection, name: str, role: Role, password: str | None, *, now_s: float
) -> str | None:
    """Add a user with a password as it is kept, or with a fresh token, which is returned and kept as a digest only.

    Raises:
        ConflictError: ``name_taken``.
    """
    token = None if password else secrets.token_urlsafe(32)
    user = UserRow(name, role, password, None if token is None else sha256(token), now_s)
    if name == ADMIN_TOKEN or not user_rows.add(connection, user):
        raise ConflictError("name_taken", f"a user {name} exists; remove it or choose another name")
    return token


def remove_user(connection: Connection, name: str) -> None:
    """Remove a user and end all sessions of it.

    Raises:
        NotFoundError: ``unknown_user``.
    """
    if not user_rows.remove(connection, name):
        raise NotFoundError("unknown_user", f"no user {name}; list them with: edge-coordinator user list")


def find_by_token(connection: Connection, token: str, admin_token: str) -> Principal | None:
    """Whose token this is."""
    if hmac.compare_digest(token.encode(), admin_token.encode()):
        return Principal(ADMIN_TOKEN, "admin")
    user = user_rows.find_by_token(connection, sha256(token))
    return None if user is None else _principal(user)


def check_bearer(connection: Connection, authorization: str, admin_token: str) -> Principal:
    """Who has the token of an ``Authorization`` header.

    Raises:
        UnauthenticatedError: ``not_admin``.
    """
    scheme, _, token = authorization.partition(" ")
    found = find_by_token(connection, token, admin_token) if scheme == "Bearer" and token else None
    if found is None:
        raise UnauthenticatedError(
            "not_admin",
            f"this needs a user's bearer token, or the one from {ADMIN_TOKEN} in the coordinator's state folder",
        )
    return found


def open_session(connection: Connection, name: str, secret: str, *, now_s: float) -> str:
    """Open a session, and return what its cookie holds.

    Args:
        connection: connection with a transaction under way.
        name: name of the user, or ``admin.token``.
        secret: the password's hash as it is kept, or the token's digest: when that changes, the session ends.
        now_s: the present moment.
    """
    cookie = secrets.token_urlsafe(32)
    user_rows.forget_sessions(connection, now_s)
    user_rows.add_session(
        connection,
        sha256(cookie),
        SessionRow(name, sha256(secret), secrets.token_urlsafe(24), now_s + SESSION_S),
    )
    return cookie


def find_session(connection: Connection, cookie: str, admin_token: str, *, now_s: float) -> Session | None:
    """The session of a cookie, unless it has expired, or its user, password or token is gone."""
    row = user_rows.find_session(connection, sha256(cookie)) if cookie else None
    if row is None or row.expires_s < now_s:
        return None
    if row.name == ADMIN_TOKEN:
        principal, secrets_now = Principal(ADMIN_TOKEN, "admin"), [admin_token]
    else:
        user = user_rows.find(connection, row.name)
        if user is None:
            return None
        principal, secrets_now = (
            _principal(user),
            [each for each in (user.password, user.token_sha256) if each],
        )
    return Session(principal, row.csrf) if row.credential in map(sha256, secrets_now) else None


def end_session(connection: Connection, cookie: str) -> None:
    """End the session of a cookie."""
    user_rows.end_session(connection, sha256(cookie))


def sha256(text: str) -> str:
    """Digest by which a random secret is known."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _principal(user: UserRow) -> Principal:
    role: Role = next(role for role in ROLES if role == user.role)
    return Principal(user.name, role)


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    data = password.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(data, salt=salt, n=n, r=r, p=p, maxmem=256 * n * r)
