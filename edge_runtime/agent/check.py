"""``edge-runtime check``: whether this device is fit to serve.

One finding a line, in the order in which to mend them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime

from msgspec import Struct

from edge_runtime.agent.client import Client
from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.own_rows import check_own_rows
from edge_runtime.agent.store import Store
from edge_runtime.agent.transport import Request, Response, Transport
from edge_runtime.engines.choice import engine_version
from edge_runtime.errors import DeviceError, EdgeError, ProtocolError, RefusedError, UnreachableError
from edge_runtime.figures import size
from edge_runtime.protocol.messages import Refusal, decode

#: Largest clock difference that coordinators accept; see docs/protocol.md.
MAX_CLOCK_OFF_S = 300.0
#: Smallest cap under which a worker can load an engine at all.
MIN_CAP_BYTES = 64 << 20


class Finding(Struct, frozen=True):
    """Outcome of one check.

    Attributes:
        name: name of the check.
        detail: description of what was found.
        error: the error that was found; None where all is well.
    """

    name: str
    detail: str
    error: EdgeError | None = None


class CheckLine(Struct, frozen=True):
    """One finding as ``--json`` tells it.

    Attributes:
        name: name of the check.
        detail: description of what was found.
        error: name of the error's class; empty where all is well.
        exit_code: exit code of that class; 0 where all is well.
    """

    name: str
    detail: str
    error: str = ""
    exit_code: int = 0

    @classmethod
    def of(cls, finding: Finding) -> CheckLine:
        """A finding's line."""
        if finding.error is None:
            return cls(finding.name, finding.detail)
        return cls(finding.name, finding.detail, type(finding.error).__name__, finding.error.exit_code)


def check_device(config: DeviceConfig, store: Store, transport: Transport) -> Iterator[Finding]:
    """Run all checks. None of them stops the others or changes anything at the coordinator."""
    yield _finding("data", lambda: _check_data(config))
    yield _finding("engine", lambda: engine_version(config.engine))
    yield _finding("cap", lambda: _check_cap(config))
    yield _finding("disk", lambda: _check_disk(config, store))
    yield _finding("key", lambda: _check_key(store))
    yield _finding("enrolment", lambda: _check_enrolment(config, store))
    answers: list[Response] = []
    yield _finding("coordinator", lambda: _check_coordinator(config, store, transport, answers))
    yield _finding("clock", lambda: _check_clock(answers))


def _finding(name: str, run: Callable[[], str]) -> Finding:
    try:
        return Finding(name, run())
    except EdgeError as error:
        return Finding(name, str(error), error)


def _check_data(config: DeviceConfig) -> str:
    if config.data is None:
        return "none; the device only fetches releases, and takes them unchecked"
    found = check_own_rows(config)
    return f"{found.rows} rows in {config.data}" + (f"; {found.note}" if found.note else "")


def _check_cap(config: DeviceConfig) -> str:
    if config.cap < MIN_CAP_BYTES:
        raise DeviceError(
            f"cap is {size(config.cap)}, under {size(MIN_CAP_BYTES)}, the least an engine loads in; raise it"
        )
    return f"{size(config.cap)} for the training process"


def _check_disk(config: DeviceConfig, store: Store) -> str:
    free_bytes = shutil.disk_usage(config.state_folder).free
    used_bytes = store.blobs.used_bytes()
    if free_bytes + used_bytes < config.disk_quota:
        raise DeviceError(
            f"disk_quota is {size(config.disk_quota)} and only {size(free_bytes + used_bytes)} can be had "
            f"on the disk of {config.state_folder}; free some space or lower disk_quota"
        )
    return f"{size(free_bytes)} free, {size(used_bytes)} of a quota of {size(config.disk_quota)} used"


def _check_key(store: Store) -> str:
    """State the public key.

    A missing key is no fault, and none is made here: a check may run as another user than the agent.
    """
    return f"public key {store.key().public_key}" if store.has_key() else "none yet; enrolment makes one"


def _check_enrolment(config: DeviceConfig, store: Store) -> str:
    identity = store.identity()
    if identity is None:
        config.read_enrolment_token()
        return "not enrolled yet; a token is at hand"
    return f"enrolled as {identity.device_id}"


def _check_coordinator(
    config: DeviceConfig, store: Store, transport: Transport, answers: list[Response]
) -> str:
    identity = store.identity()
    if identity is None:
        answer = transport.send(Request("GET", f"/v1/blobs/{'0' * 64}"))
        answers.append(answer)
        _refusal(config, answer)  # a coordinator refuses whom it does not know
        return "answers; it will know this device once it is enrolled"
    answer = Client(transport, store.key(), identity.device_id).probe()
    answers.append(answer)
    if answer.status >= 500:
        raise UnreachableError(f"the coordinator answered {answer.status}; try again later")
    refusal = _refusal(config, answer)
    if answer.status != 404:
        raise RefusedError(
            f"the coordinator does not accept this device ({refusal.code}): {refusal.message}",
            code=refusal.code,
        )
    return "answers, and accepts this device's signature"


def _refusal(config: DeviceConfig, answer: Response) -> Refusal:
    """The coordinator's refusal of a probe.

    Raises:
        UnreachableError: something else answered.
    """
    try:
        return decode(answer.body, Refusal)
    except ProtocolError:
        raise UnreachableError(
            f"{config.coordinator_url} answers with status {answer.status}, but not as a coordinator does; check the "
            "address in coordinator_url, and any proxy in between"
        ) from None


def _check_clock(answers: list[Response]) -> str:
    if not answers:
        return "not compared: the coordinator did not answer"
    try:
        theirs_s = parsedate_to_datetime(answers[0].headers.get("date", "")).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return "not compared: the coordinator's answer has no date"
    off_s = time.time() - theirs_s
    if abs(off_s) > MAX_CLOCK_OFF_S:
        raise DeviceError(
            f"the clock is {off_s:.0f} s off the coordinator's, over {MAX_CLOCK_OFF_S:.0f} s; set it"
        )
    return f"{off_s:.0f} s off the coordinator's"
