"""Who is asking: signed device requests, one-time tokens, and the operator's bearer token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coordinator.events import record
from coordinator.refusals import (
    ConflictError,
    ForbiddenError,
    MalformedError,
    NotFoundError,
    UnauthenticatedError,
)
from coordinator.storage import device_rows, task_rows, token_rows
from coordinator.storage.connection import Connection
from edge_runtime.durable import write_durably
from edge_runtime.errors import SignatureError
from edge_runtime.protocol.messages import PROTOCOL_VERSION, EnrolRequest
from edge_runtime.protocol.signing import RequestSignature, parse_request_signature, verify_headers
from edge_runtime.trouble import unusable

#: Largest difference between a device's clock and ours.
MAX_CLOCK_OFF_S = 300
ADMIN_TOKEN = "admin.token"  # noqa: S105 - a file name
#: It reads figures and nothing else: what a monitoring system is given.
METRICS_TOKEN = "metrics.token"  # noqa: S105 - a file name


@dataclass(frozen=True)
class Device:
    """An enrolled device whose request was verified.

    Attributes:
        device_id: random id of the device.
        name: name that the operator gave it.
    """

    device_id: str
    name: str


def authenticate(
    connection: Connection,
    headers: Mapping[str, str],
    *,
    method: str,
    path: str,
    now_s: float,
    wall_s: float,
) -> tuple[Device, RequestSignature]:
    """Verify a device's signature over a request's headers, and use up its nonce, before any of its body is read.

    The body's digest is one of the headers, so whoever reads the body then has only to compare that. Nothing has
    changed if this raises.

    Args:
        connection: connection with a transaction under way.
        headers: headers of the request.
        method: method of the request.
        path: path of the request, byte for byte as it was sent.
        now_s: the present moment, by time that does not jump.
        wall_s: the same by this machine's clock. Somebody may have set one of the two wrong, so a signature may fit
            either; what was forgotten of nonces is not accepted again by any.

    Returns:
        the device, and the signature with the digest that the body must have.

    Raises:
        UnauthenticatedError: ``unsigned``, ``unknown_device``, ``clock_off``, ``bad_signature``, ``replayed``.
        ForbiddenError: ``revoked``.
    """
    try:
        signature = parse_request_signature(headers)
    except SignatureError as error:
        raise UnauthenticatedError("unsigned", str(error)) from error
    device = device_rows.find(connection, signature.device_id)
    if device is None:
        raise UnauthenticatedError(
            "unknown_device", f"no device {signature.device_id} is enrolled here; enrol first"
        )
    if device.revoked_s is not None:
        raise ForbiddenError("revoked", f"device {device.name} was revoked by its operator")
    try:
        verify_headers(device.public_key, signature, method=method, path=path)
    except SignatureError as error:
        raise UnauthenticatedError("bad_signature", str(error)) from error
    off_s = min(abs(now_s - signature.created_s), abs(wall_s - signature.created_s))
    expires_s = signature.created_s + MAX_CLOCK_OFF_S + 1
    if off_s > MAX_CLOCK_OFF_S or expires_s <= device_rows.nonces_forgotten_to_s(connection):
        raise UnauthenticatedError(
            "clock_off",
            f"the signature's time is {off_s:.0f} s off, over {MAX_CLOCK_OFF_S} s; set the clock",
        )
    if not device_rows.use_nonce(connection, device.device_id, signature.nonce, expires_s=expires_s):
        raise UnauthenticatedError(
            "replayed", "this request was seen before; sign it again with a fresh nonce"
        )
    return Device(device.device_id, device.name), signature


def forget_nonces(connection: Connection, *, now_s: float, wall_s: float) -> None:
    """Forget nonces that no request can carry any more: their signatures are too old by either clock.

    Args:
        connection: connection with a transaction under way.
        now_s: the present moment, by time that does not jump.
        wall_s: the same by this machine's clock.
    """
    device_rows.forget_nonces(connection, min(now_s, wall_s))


def create_token(connection: Connection, *, valid_s: float, now_s: float) -> str:
    """A fresh one-time enrolment token that is valid for so many seconds; only its sha256 is kept."""
    token = secrets.token_urlsafe(24)
    token_rows.add(connection, _sha256(token), expires_s=now_s + valid_s)
    return token


def enrol(connection: Connection, request: EnrolRequest, *, now_s: float) -> str:
    """Use up a token and return the new device's id; a device that repeats its request gets the same id again.

    Raises:
        MalformedError: ``protocol_unknown``.
        UnauthenticatedError: ``unknown_token``, ``token_used``, ``token_expired``.
        ConflictError: ``name_taken``.
    """
    if request.protocol > PROTOCOL_VERSION:
        raise MalformedError(
            "protocol_unknown",
            f"protocol {request.protocol} is newer than {PROTOCOL_VERSION} spoken here",
        )
    token = token_rows.find(connection, _sha256(request.token))
    if token is None:
        raise UnauthenticatedError("unknown_token", "no such enrolment token; ask the operator for one")
    if token.device_id is not None:
        return _same_device(connection, token.device_id, request)
    if token.expires_s < now_s:
        raise UnauthenticatedError(
            "token_expired", "the enrolment token has expired; ask the operator for a new one"
        )
    device_id = f"d-{secrets.token_hex(8)}"
    added = device_rows.add(
        connection,
        device_id,
        name=request.device_name,
        device_class=request.device_class,
        public_key=request.public_key,
        enrolled_s=now_s,
    )
    if not added:
        raise ConflictError(
            "name_taken",
            f"a device named {request.device_name} is enrolled; revoke it or choose another name",
        )
    token_rows.use(connection, _sha256(request.token), device_id)
    record(connection, now_s, "enrolled", f"class {request.device_class}", device=request.device_name)
    return device_id


def revoke(connection: Connection, name: str, *, now_s: float) -> Device:
    """Refuse all further requests of a device; its open task is given to another.

    Args:
        connection: connection with a transaction under way.
        name: name or id of the device.
        now_s: the present moment, in seconds since 1970.

    Returns:
        the device.

    Raises:
        NotFoundError: ``unknown_device``.
    """
    device = device_rows.find_unrevoked(connection, name)
    if device is None:
        raise NotFoundError(
            "unknown_device", f"no device {name} is enrolled; list them with: edge-coordinator device list"
        )
    device_rows.revoke(connection, device.device_id, revoked_s=now_s)
    task_rows.lapse_open_of_device(connection, device.device_id)
    record(connection, now_s, "revoked", "by the operator", device=device.name)
    return Device(device.device_id, device.name)


def load_token(folder: Path, name: str) -> str:
    """A bearer token of the state folder; made on first use, readable by its owner only (mode 0600).

    Args:
        folder: state folder.
        name: ADMIN_TOKEN or METRICS_TOKEN.

    Raises:
        ConfigError: the file cannot be read or written.
        ResourceError: not now, that is.
    """
    path = folder / name
    try:
        if not path.exists():
            # Of coordinators that share the folder and start at once, all have the token of the first.
            fresh = path.with_name(f".{ADMIN_TOKEN}.{secrets.token_hex(8)}")
            write_durably(fresh, (secrets.token_urlsafe(32) + "\n").encode("ascii"), mode=0o600)
            with suppress(FileExistsError):
                path.hardlink_to(fresh)
            fresh.unlink()
        return path.read_text("ascii").strip()
    except OSError as error:
        raise unusable(str(path), error) from error


def check_monitor(authorization: str, tokens: tuple[str, ...]) -> None:
    """Compare an ``Authorization`` header with the tokens that read figures, each in constant time.

    Raises:
        UnauthenticatedError: ``not_monitor``.
    """
    matches = [hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()) for token in tokens]
    if not any(matches):
        raise UnauthenticatedError(
            "not_monitor",
            f"this needs the bearer token from {METRICS_TOKEN} in the coordinator's state folder",
        )


def _same_device(connection: Connection, device_id: str, request: EnrolRequest) -> str:
    device = device_rows.find(connection, device_id)
    same = device is not None and (device.name, device.public_key, device.revoked_s) == (
        request.device_name,
        request.public_key,
        None,
    )
    if same:
        return device_id
    raise UnauthenticatedError(
        "token_used", "the enrolment token was used before; ask the operator for a new one"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
