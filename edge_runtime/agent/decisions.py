"""What the agent decides, apart from how it moves bytes: this module uses no clock, file, socket or process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

from edge_runtime.agent.config import DeviceConfig
from edge_runtime.agent.store import TakenRelease
from edge_runtime.errors import (
    CapExceededError,
    ConfigError,
    DataError,
    DeviceError,
    EdgeError,
    OutOfMemoryError,
    PackageError,
    ProtocolError,
    RefusedError,
    SignatureError,
    UnreachableError,
)
from edge_runtime.figures import size, whole_size
from edge_runtime.package.manifest import Manifest, parse_manifest
from edge_runtime.protocol.messages import (
    MAX_RESULT_BYTES,
    BestOf,
    DeviceEvent,
    MaskingKeys,
    Release,
    Result,
    SignedRelease,
    SignedTask,
    Task,
    decode,
    encode_result,
)
from edge_runtime.protocol.signing import verify
from edge_runtime.training.methods import check_method, check_task
from edge_runtime.trouble import passing_trouble
from edge_runtime.worker.jobs import TrainOutcome

T = TypeVar("T")

FIRST_BACK_OFF_S = 5.0
LONGEST_BACK_OFF_S = 15 * 60.0
#: Wait after a refusal that only a person can change; it is spread by a fifth either way.
REFUSED_WAIT_S = 3600.0
#: Longest wait that a coordinator's answer is obeyed for: it may be mistaken, and an early check-in costs little.
LONGEST_WAIT_S = 6 * 3600.0
#: Codes of refusals for good: the agent ends.
FINAL_REFUSALS = frozenset({"revoked"})
#: Errors of a task that the next task would meet too, until somebody changes something here or in the run: wrong keys,
#: rows or settings that do not fit, a package for another engine or format, too small a cap.
LASTING = (CapExceededError, ConfigError, DataError, PackageError, SignatureError)
#: Codes of refusals that pass by themselves: the clock gets set, and the next request has another nonce.
PASSING_REFUSALS = frozenset({"clock_off", "replayed"})
#: Share of the last budget that the next plan may use after an out-of-memory kill.
SMALLER_PLAN = 0.75
_MAX_MESSAGE_CHARACTERS = 2000


def open_task(answer: SignedTask, coordinator_key: str) -> Task:
    """The task, if the coordinator whose key was pinned signed it.

    Raises:
        SignatureError: somebody else signed it.
        ProtocolError: it is malformed.
    """
    return _open(Task, answer.task, answer.signature, coordinator_key, what="the task")


def open_release(answer: SignedRelease, coordinator_key: str) -> Release:
    """The release, if the coordinator whose key was pinned signed it.

    Raises:
        SignatureError: somebody else signed it.
        ProtocolError: it is malformed.
    """
    return _open(Release, answer.release, answer.signature, coordinator_key, what="the release")


def _open(kind: type[T], text: str, signature: str, coordinator_key: str, *, what: str) -> T:
    """A message, decoded only once its signature is verified."""
    data = text.encode()
    verify(coordinator_key, data, signature, what=what)
    return decode(data, kind)


def open_manifest(data: bytes, package_sha256: str, signature: str, publisher_key: str) -> Manifest:
    """The manifest, if its publisher signed it; unsigned bytes are never parsed.

    Raises:
        SignatureError: somebody else signed it.
        PackageError: it is malformed.
        FormatVersionError: it is newer than this program.
    """
    verify(publisher_key, data, signature, what=f"package {package_sha256}")
    return parse_manifest(data)


def admit_task(task: Task, config: DeviceConfig) -> None:
    """Check what the task asks for against what the operator grants.

    Raises:
        CapExceededError: it needs more memory than the cap.
    """
    if task.required_bytes > config.cap:
        raise CapExceededError(
            f"task {task.task_id} needs {whole_size(task.required_bytes, up=True)} and the cap is {size(config.cap)}; "
            "raise cap, or let the run assign less to this class of device",
            required_bytes=task.required_bytes,
            cap_bytes=config.cap,
        )


def admit_package(task: Task, manifest: Manifest, config: DeviceConfig) -> None:
    """Check the task against its package, and the package against the device's limits.

    Raises:
        PackageError: the task asks for something that the package does not have.
        ConfigError: settings of the task exclude each other, or do not suit the package; or a file, or all files
            together, exceed a limit of the configuration.
    """
    check_method(task)
    check_task(task, manifest)
    if task.sequence_limit > manifest.sequence_limit:
        raise PackageError(
            f"task {task.task_id} asks for {task.sequence_limit} tokens a row "
            f"and package {manifest.name} takes {manifest.sequence_limit}; correct the run"
        )
    admit_files(manifest, config)


def admit_files(manifest: Manifest, config: DeviceConfig) -> None:
    """Check a package's files against the device's limits.

    Raises:
        ConfigError: a file, or all files together, exceed a limit of the configuration.
    """
    for name, entry in manifest.files.items():
        if entry.bytes > config.max_blob_bytes:
            raise ConfigError(
                f"{name} of package {manifest.name} has {size(entry.bytes)} "
                f"and max_blob_bytes is {size(config.max_blob_bytes)}; raise it, or export a smaller package"
            )
    total_bytes = sum(entry.bytes for entry in manifest.files.values())
    if total_bytes > config.disk_quota:
        raise ConfigError(
            f"package {manifest.name} has {size(total_bytes)} and disk_quota is {size(config.disk_quota)}; "
            "raise it, or export a smaller package"
        )


def may_pass(error: EdgeError) -> bool:
    """Whether a release that met an error may be taken at the next check-in, with nothing changed here or in it.

    An error of the device that is of no class of its own is of this kind: downloads that do not fit the disk now.
    """
    if isinstance(error, RefusedError):
        return error.code in FINAL_REFUSALS | PASSING_REFUSALS
    return isinstance(error, UnreachableError) or type(error) is DeviceError


def below_limits(taken: TakenRelease) -> str | None:
    """Why a release must not be used after the device's own check; None if it may be.

    Without rows of its own a device has nothing to check, and takes the operator's word.
    """
    release = taken.release
    if taken.accuracy is None or taken.mean_loss is None:
        return None
    if release.lowest_accuracy is not None and taken.accuracy < release.lowest_accuracy:
        return (
            f"on the {taken.rows} rows here its accuracy is {taken.accuracy:.3f}, and the release asks for "
            f"{release.lowest_accuracy:g} or more"
        )
    if release.highest_loss is not None and not taken.mean_loss <= release.highest_loss:
        return (
            f"on the {taken.rows} rows here its mean loss is {taken.mean_loss:.3f}, and the release asks for "
            f"{release.highest_loss:g} or less"
        )
    return None


def describe_taken_release(taken: TakenRelease) -> DeviceEvent:
    """The event that tells operators that a device uses a release."""
    scored = (
        "no rows here to check it on"
        if taken.accuracy is None
        else f"accuracy {taken.accuracy:.3f}, mean loss {taken.mean_loss:.3f} on the {taken.rows} rows here"
    )
    return DeviceEvent("release_taken", f"release {taken.release.number}: {scored}")


def describe_refused_release(release: Release, reason: str, current: TakenRelease | None) -> DeviceEvent:
    """The event that tells operators that a device does not use a release, and what it goes on with."""
    goes_on = "no release" if current is None else f"release {current.release.number}"
    message = f"release {release.number}: {reason}; the device goes on with {goes_on}"
    return DeviceEvent("release_refused", message[:_MAX_MESSAGE_CHARACTERS])


def smaller_budget(budget_bytes: int) -> int:
    """Bytes that the next plan may use, after a plan for ``budget_bytes`` met the cap."""
    return int(budget_bytes * SMALLER_PLAN)


def build_result(
    task: Task,
    outcome: TrainOutcome,
    change: bytes,
    *,
    kept: Sequence[str] = (),
    removed: Sequence[bytes] = (),
    masking: MaskingKeys | None = None,
) -> bytes:
    """The encoded result of a task.

    Args:
        task: the task.
        outcome: what the worker made of it.
        change: safetensors bytes that the worker wrote.
        kept: digests of the sums from before that stand.
        removed: sums from before that stand no more.
        masking: keys by which the change will be masked, which is then not sent here.

    Raises:
        ProtocolError: it is larger than the protocol allows.
    """
    hides = task.protection is not None and task.protection.hides
    taken: BestOf = "backprop" if outcome.plan.work.update == "backprop" else "forward"
    body = encode_result(
        Result(
            task_id=task.task_id,
            run_id=task.run_id,
            round=task.round,
            # Figures of the rows would tell what clipping, noise and masks are there to hide.
            examples=1 if hides else outcome.examples,
            steps_applied=task.steps if hides else outcome.steps_applied,
            steps_skipped=0 if hides else outcome.steps_skipped,
            mean_loss=None if task.protection is not None else outcome.mean_loss,
            seconds=outcome.seconds,
            memory=outcome.memory,
            change_sha256=hashlib.sha256(change).hexdigest(),
            change=change,
            update=taken if task.update == "best" else None,
            draws=outcome.plan.work.draws if task.update == "best" and taken == "forward" else 0,
            kept=tuple(kept),
            removed=tuple(removed),
            masking=masking,
        )
    )
    if len(body) > MAX_RESULT_BYTES:
        raise ProtocolError(
            f"the result of task {task.task_id} has {len(body)} bytes, over the limit of {MAX_RESULT_BYTES}; "
            "assign fewer or smaller slices"
        )
    return body


def describe(code: str, error: Exception, task_id: str | None) -> DeviceEvent:
    """The event that tells operators why a task was refused or failed.

    The message begins with the reason: ``cap`` for memory, else the error's class. Errors of this project never quote
    data; of any other error only the class is told, and what the machine lacks for now, such as space on its disk.
    """
    reason = "cap" if isinstance(error, CapExceededError) else type(error).__name__
    trouble = passing_trouble(error)
    detail = f": {error}" if isinstance(error, EdgeError) else f": {trouble}" if trouble else ""
    message = f"{reason}{detail}"[:_MAX_MESSAGE_CHARACTERS]
    return DeviceEvent(code=code, message=message, task_id=task_id, lasting=isinstance(error, LASTING))


def describe_retry(error: OutOfMemoryError, budget_bytes: int, task_id: str) -> DeviceEvent:
    """The event that tells operators that a task goes on with a smaller plan after it ran out of memory."""
    message = f"{error}; trying once more with a plan for {size(budget_bytes)}"
    return DeviceEvent("plan_reduced", message[:_MAX_MESSAGE_CHARACTERS], task_id)


class Pace:
    """Seconds to wait between turns. They are drawn at random, so that the devices of a fleet never act all at once.

    Args:
        source: source of the random choices.
    """

    def __init__(self, source: random.Random) -> None:
        self._random = source
        self._failures = 0

    def asked(self, after_min_s: float, after_max_s: float) -> float:
        """Wait after an answer without work: within the window that the coordinator named, and within reason."""
        self._failures = 0
        latest_s = min(max(after_min_s, after_max_s), LONGEST_WAIT_S)
        return self._random.uniform(min(after_min_s, latest_s), latest_s)

    def done(self) -> float:
        """Wait after a task that went well: none."""
        self._failures = 0
        return 0.0

    def failed(self, retry_after_s: float | None = None) -> float:
        """Wait after a failure that may pass: exponential back-off with full jitter.

        Args:
            retry_after_s: least wait that the coordinator asked for, to which the jitter is added; None if it asked for
                none.
        """
        longest_s = min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return min(retry_after_s or 0.0, LONGEST_WAIT_S) + self._random.uniform(0.0, longest_s)

    def refused(self) -> float:
        """Wait after a refusal that only a person can change."""
        return REFUSED_WAIT_S * self._random.uniform(0.8, 1.2)
