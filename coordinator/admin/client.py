"""The command line's side of the admin API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
import urllib3

from coordinator.api.admin_api import (
    Act,
    DeviceChanged,
    ReleaseRequest,
    RunPaused,
    RunRolledBack,
    RunStopped,
    UserAdded,
    UserRemoved,
    UserSummary,
)
from coordinator.api.serve import ADDRESS, CERTIFICATE
from coordinator.auth import ADMIN_TOKEN
from coordinator.config import RunConfig
from coordinator.monitoring.readiness import Readiness
from coordinator.rounds.summary import DeviceSummary, EventSummary, ReleaseSummary, RunSummary
from edge_runtime.decoding import MALFORMED
from edge_runtime.errors import ConfigError, ProtocolError, RefusedError, UnreachableError
from edge_runtime.protocol.connection_errors import why_no_answer
from edge_runtime.protocol.messages import Refusal

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
#: Longest silence of a coordinator, which verifies a whole package when a run is created.
READ_TIMEOUT_S = 300.0


class AdminClient:
    """Calls of one coordinator's admin API; every method may raise a ``CoordinatorError``.

    Args:
        url: address of the coordinator.
        token: the operator's bearer token.
        ca: certificates to trust for https, PEM; None trusts those of the system.
        certificate_sha256: digest of the one certificate to trust instead, whatever names it has; None trusts none so.
    """

    def __init__(
        self, url: str, token: str, ca: Path | None = None, *, certificate_sha256: str | None = None
    ) -> None:
        self.url = url.rstrip("/")
        known: dict[str, Any] = {"cert_reqs": "CERT_NONE", "assert_fingerprint": certificate_sha256}
        self._pool = urllib3.PoolManager(
            ca_certs=None if ca is None else str(ca),
            **(known if certificate_sha256 else {}),
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            retries=False,
            headers={"Authorization": f"Bearer {token}"},
        )

    def create_token(self, valid_s: float = 86400.0) -> str:
        """A fresh one-time enrolment token."""
        answer = self._call("POST", "/tokens", {"valid_s": valid_s})
        return str(_decode(answer, dict[str, str | float])["token"])

    def create_run(self, config: RunConfig) -> str:
        """Queue a run and return its id."""
        answer = self._call("POST", "/runs", msgspec.to_builtins(config))
        return str(_decode(answer, dict[str, str])["run_id"])

    def list_runs(self) -> list[RunSummary]:
        """All runs, oldest first, without their rounds."""
        return _decode(self._call("GET", "/runs"), list[RunSummary])

    def run(self, run_id: str = "latest") -> RunSummary:
        """A run with its rounds."""
        return _decode(self._call("GET", f"/runs/{quote(run_id, safe='')}"), RunSummary)

    def events(self, run_id: str = "latest") -> list[EventSummary]:
        """All events of a run, oldest first."""
        events: list[EventSummary] = []
        while True:
            after = events[-1].event_id if events else 0
            page = _decode(
                self._call("GET", f"/runs/{quote(run_id, safe='')}/events?after={after}"), list[EventSummary]
            )
            if not page:
                return events
            events += page

    def slices(self, run_id: str = "latest") -> bytes:
        """The run's current slice values as safetensors bytes."""
        return self._call("GET", f"/runs/{quote(run_id, safe='')}/slices")

    def publish(self, request: ReleaseRequest) -> ReleaseSummary:
        """Publish values of a run for devices to use."""
        return _decode(self._call("POST", "/releases", msgspec.to_builtins(request)), ReleaseSummary)

    def releases(self) -> list[ReleaseSummary]:
        """All releases, oldest first."""
        return _decode(self._call("GET", "/releases"), list[ReleaseSummary])

    def pause_run(self, run_id: str, *, paused: bool) -> RunPaused:
        """Pause a run, or let it go on."""
        word = "pause" if paused else "resume"
        return _decode(self._call("POST", f"/runs/{quote(run_id, safe='')}/{word}"), RunPaused)

    def roll_back_run(self, run_id: str, to: int) -> RunRolledBack:
        """Let a run stand again where it stood after a committed round."""
        return _decode(
            self._call("POST", f"/runs/{quote(run_id, safe='')}/rollback", {"to": to}), RunRolledBack
        )

    def stop_run(self, run_id: str = "latest") -> RunStopped:
        """Stop a run, and tell which one and what it was doing."""
        return _decode(self._call("POST", f"/runs/{quote(run_id, safe='')}/stop"), RunStopped)

    def revoke_device(self, name: str) -> DeviceChanged:
        """Refuse all further requests of a device."""
        return _decode(self._call("POST", f"/devices/{quote(name, safe='')}/revoke"), DeviceChanged)

    def resume_device(self, name: str) -> DeviceChanged:
        """Let the run that is going on ask a device again."""
        return _decode(self._call("POST", f"/devices/{quote(name, safe='')}/resume"), DeviceChanged)

    def devices(self) -> list[DeviceSummary]:
        """All devices that ever enrolled, by name."""
        return _decode(self._call("GET", "/devices"), list[DeviceSummary])

    def add_user(self, name: str, role: str, password: str | None) -> UserAdded:
        """Add a user with a password, or with a token that the answer holds."""
        return _decode(
            self._call("POST", "/users", {"name": name, "role": role, "password": password}), UserAdded
        )

    def users(self) -> list[UserSummary]:
        """All users, by name."""
        return _decode(self._call("GET", "/users"), list[UserSummary])

    def remove_user(self, name: str) -> UserRemoved:
        """Remove a user and end all its sessions."""
        return _decode(self._call("POST", f"/users/{quote(name, safe='')}/remove"), UserRemoved)

    def acts(self, limit: int) -> list[Act]:
        """The newest acts of the audit log, the newest first."""
        return _decode(self._call("GET", f"/audit?limit={limit}"), list[Act])

    def readiness(self) -> Readiness:
        """What stands in the way of the coordinator's work."""
        return _decode(self._send("GET", "/readyz").data, Readiness)

    def _call(self, method: str, path: str, body: object = None) -> bytes:
        answer = self._send(method, f"/v1/admin{path}", body)
        if 400 <= answer.status < 500:
            refusal = self._refusal(answer)
            raise RefusedError(refusal.message, code=refusal.code)
        if answer.status >= 300:
            raise UnreachableError(f"{self.url} answered {answer.status}; its log tells why")
        return answer.data

    def _send(self, method: str, path: str, body: object = None) -> urllib3.BaseHTTPResponse:
        try:
            return self._pool.request(
                method,
                f"{self.url}{path}",
                body=None if body is None else json.dumps(body).encode(),
                headers={**self._pool.headers, "Content-Type": "application/json"},
            )
        except urllib3.exceptions.HTTPError as error:
            reason = why_no_answer(error, patience_s=READ_TIMEOUT_S)
            raise UnreachableError(
                f"no answer from {self.url}: {reason}; is the coordinator running?"
            ) from error

    def _refusal(self, answer: urllib3.BaseHTTPResponse) -> Refusal:
        """The refusal that an answer holds; without one, something else than a coordinator gave it."""
        try:
            return msgspec.json.decode(answer.data, type=Refusal)
        except MALFORMED as error:
            raise ProtocolError(
                f"what answers at {self.url} ({answer.status}) is no coordinator; check host and port of the address"
            ) from error


def connect(state: Path | None, url: str | None, token_file: Path | None, ca: Path | None) -> AdminClient:
    """A client from a state folder on this machine, or from an address and a token file.

    Args:
        state: state folder of a coordinator on this machine, if there is one.
        url: address of the coordinator; None reads it from the state folder.
        token_file: file with the operator's token; None takes the one in the state folder.
        ca: certificates to trust for https, PEM; None trusts those of the system.

    Raises:
        ConfigError: neither is given, or a file cannot be read.
    """
    certificate_sha256 = None
    if state is not None:
        if url is None and ca is None and (state / CERTIFICATE).exists():
            certificate_sha256 = _read(state / CERTIFICATE)
        url = url or _read(state / ADDRESS)
        token_file = token_file or state / ADMIN_TOKEN
    if url is None or token_file is None:
        raise ConfigError(
            "give --state DIR on the coordinator's machine, or --url URL and --admin-token-file FILE"
        )
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--url {url} must read http://host:port or https://host:port")
    if ca is not None and not ca.is_file():
        raise ConfigError(f"--ca {ca} is no file; it must hold certificates to trust, PEM")
    return AdminClient(url, _read(token_file), ca, certificate_sha256=certificate_sha256)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; was the coordinator ever started there?"
        ) from error


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except MALFORMED as error:
        raise ProtocolError(f"the coordinator's answer cannot be read: {error}") from error
