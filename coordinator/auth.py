"""Who is asking: signed device requests, one-time tokens, and the operator's bearer token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.events import record
from coordinator.refusals import RefusalError
from edge_runtime.durable import write_durably
from edge_runtime.errors import ConfigError, SignatureError
from edge_runtime.protocol.messages import PROTOCOL_VERSION, EnrolRequest
from edge_runtime.protocol.signing import RequestSignature, parse_request_signature, verify_request

#: Largest difference between a device's clock and ours.
MAX_CLOCK_OFF_S = 300
ADMIN_TOKEN = "admin.token"  # noqa: S105 - a file name


@dataclass(frozen=True)
class Device:
    """An enrolled device whose request was verified."""

    device_id: str
    name: str


def identify(
    connection: sqlite3.Connection, headers: Mapping[str, str], *, now_s: float
) -> tuple[RequestSignature, sqlite3.Row]:
    """Who says to be asking; read-only, and before the body is read, so that strangers cannot send bodies.

    Raises:
        RefusalError: 401 ``unsigned``, ``unknown_device``, ``clock_off``; 403 ``revoked``.
    """
    try:
        signature = parse_request_signature(headers)
    except SignatureError as error:
        raise RefusalError(401, "unsigned", str(error)) from error
    row: sqlite3.Row | None = connection.execute(
        "SELECT name, public_key, revoked_s FROM devices WHERE device_id = ?", (signature.device_id,)
    ).fetchone()
    if row is None:
        raise RefusalError(
            401, "unknown_device", f"no device {signature.device_id} is enrolled here; enrol first"
        )
    if row["revoked_s"] is not None:
        raise RefusalError(403, "revoked", f"device {row['name']} was revoked by its operator")
    off_s = abs(now_s - signature.created_s)
    if off_s > MAX_CLOCK_OFF_S:
        raise RefusalError(
            401,
            "clock_off",
            f"the signature's time is {off_s:.0f} s off, over {MAX_CLOCK_OFF_S} s; set the clock",
        )
    return signature, row


def authenticate(
    connection: sqlite3.Connection,
    headers: Mapping[str, str],
    *,
    method: str,
    path: str,
    body: bytes,
    now_s: float,
) -> Device:
    """Verify a device's signature over exactly these bytes, and use up its nonce.

    Raises:
        RefusalError: as :func:`identify`, and 401 ``bad_signature``, ``replayed``; nothing has changed then.
    """
    signature, row = identify(connection, headers, now_s=now_s)
    try:
        verify_request(row["public_key"], signature, method=method, path=path, body=body)
    except SignatureError as error:
        raise RefusalError(401, "bad_signature", str(error)) from error
    connection.execute("DELETE FROM nonces WHERE expires_s < ?", (now_s,))
    added = connection.execute(
        "INSERT OR IGNORE INTO nonces VALUES (?, ?, ?)",
        (signature.device_id, signature.nonce, signature.created_s + MAX_CLOCK_OFF_S + 1),
    )
    if added.rowcount == 0:
        raise RefusalError(401, "replayed", "this request was seen before; sign it again with a fresh nonce")
    return Device(signature.device_id, row["name"])


def create_token(connection: sqlite3.Connection, *, valid_s: float, now_s: float) -> str:
    """A fresh one-time enrolment token; only its sha256 is kept."""
    token = secrets.token_urlsafe(24)
    connection.execute("INSERT INTO tokens VALUES (?, ?, NULL)", (_sha256(token), now_s + valid_s))
    return token


def enrol(connection: sqlite3.Connection, request: EnrolRequest, *, now_s: float) -> str:
    """Use up a token and return the new device's id; the same device repeating itself gets the same id.

    Raises:
        RefusalError: 401 ``unknown_token``, ``token_used``, ``token_expired``; 409 ``name_taken``;
            400 ``protocol_unknown``.
    """
    if request.protocol > PROTOCOL_VERSION:
        raise RefusalError(
            400,
            "protocol_unknown",
            f"protocol {request.protocol} is newer than {PROTOCOL_VERSION} spoken here",
        )
    token = connection.execute(
        "SELECT expires_s, device_id FROM tokens WHERE token_sha256 = ?", (_sha256(request.token),)
    ).fetchone()
    if token is None:
        raise RefusalError(401, "unknown_token", "no such enrolment token; ask the operator for one")
    if token["device_id"] is not None:
        return _same_device(connection, token["device_id"], request)
    if token["expires_s"] < now_s:
        raise RefusalError(
            401, "token_expired", "the enrolment token has expired; ask the operator for a new one"
        )
    device_id = f"d-{secrets.token_hex(8)}"
    try:
        connection.execute(
            "INSERT INTO devices (device_id, name, class, public_key, enrolled_s) VALUES (?, ?, ?, ?, ?)",
            (device_id, request.device_name, request.device_class, request.public_key, now_s),
        )
    except sqlite3.IntegrityError as error:
        raise RefusalError(
            409,
            "name_taken",
            f"a device named {request.device_name} is enrolled; revoke it or choose another name",
        ) from error
    connection.execute(
        "UPDATE tokens SET device_id = ? WHERE token_sha256 = ?", (device_id, _sha256(request.token))
    )
    record(connection, now_s, "enrolled", f"class {request.device_class}", device=request.device_name)
    return device_id


def revoke(connection: sqlite3.Connection, name: str, *, now_s: float) -> str:
    """Refuse all further requests of a device, by name or id; its open task is given to another.

    Returns:
        the device's id.

    Raises:
        RefusalError: 404 ``unknown_device``.
    """
    row = connection.execute(
        "SELECT device_id, name FROM devices WHERE (name = ? OR device_id = ?) AND revoked_s IS NULL",
        (name, name),
    ).fetchone()
    if row is None:
        raise RefusalError(404, "unknown_device", f"no device {name} is enrolled")
    connection.execute("UPDATE devices SET revoked_s = ? WHERE device_id = ?", (now_s, row["device_id"]))
    connection.execute(
        "UPDATE tasks SET state = 'lapsed', reason = 'revoked'"
        " WHERE device_id = ? AND state IN ('reserved', 'working')",
        (row["device_id"],),
    )
    record(connection, now_s, "revoked", "by the operator", device=row["name"])
    return str(row["device_id"])


def load_admin_token(folder: Path) -> str:
    """The operator's bearer token; made on first use, readable by its owner only (mode 0600).

    Raises:
        ConfigError: the file cannot be read or written.
    """
    path = folder / ADMIN_TOKEN
    try:
        if not path.exists():
            write_durably(path, (secrets.token_urlsafe(32) + "\n").encode("ascii"), mode=0o600)
        return path.read_text("ascii").strip()
    except OSError as error:
        raise ConfigError(f"cannot use {path}: {error.strerror}") from error


def check_admin(authorization: str, token: str) -> None:
    """Compare an ``Authorization`` header with the operator's token, in constant time.

    Raises:
        RefusalError: 401 ``not_admin``.
    """
    if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
        raise RefusalError(
            401,
            "not_admin",
            f"this needs the bearer token from {ADMIN_TOKEN} in the coordinator's state folder",
        )


def _same_device(connection: sqlite3.Connection, device_id: str, request: EnrolRequest) -> str:
    row = connection.execute(
        "SELECT name, public_key, revoked_s FROM devices WHERE device_id = ?", (device_id,)
    ).fetchone()
    if (row["name"], row["public_key"]) == (request.device_name, request.public_key) and row[
        "revoked_s"
    ] is None:
        return device_id
    raise RefusalError(
        401, "token_used", "the enrolment token was used before; ask the operator for a new one"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
