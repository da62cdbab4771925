"""Every error of the system, rooted by whose fault it is.

    EdgeError
    ├── DeviceError            this machine, its configuration, its data or its limits
    │   ├── ConfigError            a configuration file or command line that cannot be used
    │   ├── DataError              a row of the device's own data that cannot be used
    │   ├── CapExceededError       the work needs more memory than the operator granted
    │   ├── WorkerError            the training process died or broke its contract
    │   ├── OutOfMemoryError       the training process met the cap as it ran
    │   ├── PreparationError       a package that is not, or cannot be, prepared for this machine
    │   ├── BudgetError            a profiled run that did not keep to its memory budget
    │   ├── RegressionError        a profiled run that takes more memory than an earlier one
    │   └── ResourceError          what this machine lacks for now: disk, descriptors, memory, a lock
    ├── CoordinatorError       the other side of the wire
    │   ├── UnreachableError       no answer: try again later
    │   ├── RefusedError           a clear no, with a reason code
    │   └── ProtocolError          an answer that does not fit the protocol
    └── ArtefactError          a file or package somebody else made
        ├── ModelError             a model folder the exporter cannot use
        ├── PackageError           a package that is malformed
        ├── FormatVersionError     a package newer than this program
        ├── DigestError            bytes that do not match their sha256
        ├── SignatureError         a signature that is missing or wrong
        └── SliceError             slice values that do not fit their specification

A message says what happened, which limit was met and what to do next, in one line. Each class has a
stable process exit code, explained in docs/errors.md.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of all errors this project raises on purpose."""

    exit_code = 1


class DeviceError(EdgeError):
    """The fault lies with this machine: its configuration, data or limits."""

    exit_code = 10


class ConfigError(DeviceError):
    """A configuration file or command line cannot be used as it is."""

    exit_code = 11


class DataError(DeviceError):
    """A row of local data cannot be used; the message names file and line, never the text."""

    exit_code = 12


class CapExceededError(DeviceError):
    """The work needs more memory than the cap.

    Attributes:
        required_bytes: memory that the work needs, in bytes.
        cap_bytes: memory that the operator granted, in bytes.
    """

    exit_code = 13

    def __init__(self, message: str, *, required_bytes: int, cap_bytes: int) -> None:
        super().__init__(message)
        self.required_bytes = required_bytes
        self.cap_bytes = cap_bytes


class WorkerError(DeviceError):
    """The training process died, was killed or answered nonsense."""

    exit_code = 14


class OutOfMemoryError(DeviceError):
    """The training process met the cap as it ran: the kernel killed it, or refused it memory.

    Attributes:
        phase: the phase of work that the process had announced last.
        last_bytes: resident memory when the process was last looked at; 0 if it never was.
        cap_bytes: memory that the process was held to; 0 if the process that raises this error does not know.
        enforced_by: means that held it there: ``cgroup_v2``, ``cgroup_v1``, ``rlimit`` or ``none``.
    """

    exit_code = 15

    def __init__(
        self, message: str, *, phase: str = "", last_bytes: int = 0, cap_bytes: int = 0, enforced_by: str = ""
    ) -> None:
        super().__init__(message)
        self.phase = phase
        self.last_bytes = last_bytes
        self.cap_bytes = cap_bytes
        self.enforced_by = enforced_by


class PreparationError(DeviceError):
    """A package is not prepared for this machine, was prepared for another, or cannot be."""

    exit_code = 16


class BudgetError(DeviceError):
    """A profiled run ended, and did not keep to its memory budget: it passed the cap, or it leaks."""

    exit_code = 17


class RegressionError(DeviceError):
    """A profiled run takes more memory than an earlier report's, beyond the tolerance."""

    exit_code = 18


class ResourceError(DeviceError):
    """The machine lacks something for now: space on the disk, descriptors, memory, a lock. Waiting helps."""

    exit_code = 19


class CoordinatorError(EdgeError):
    """The fault lies with the coordinator or the way to it."""

    exit_code = 20


class UnreachableError(CoordinatorError):
    """No usable answer came; trying again later may help.

    Attributes:
        retry_after_s: seconds that the coordinator asked to wait; None if it did not say.
    """

    exit_code = 21

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RefusedError(CoordinatorError):
    """The coordinator said no.

    Attributes:
        code: the machine-readable reason; docs/protocol.md lists them.
    """

    exit_code = 22

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class ProtocolError(CoordinatorError):
    """The coordinator's answer does not fit the protocol."""

    exit_code = 23


class ArtefactError(EdgeError):
    """The fault lies in a file that somebody else made."""

    exit_code = 30


class ModelError(ArtefactError):
    """A model folder cannot be exported."""

    exit_code = 31


class PackageError(ArtefactError):
    """A package is malformed or incomplete."""

    exit_code = 32


class FormatVersionError(PackageError):
    """A package was written in a newer format than this program reads."""

    exit_code = 33


class DigestError(ArtefactError):
    """Bytes do not match the sha256 they were announced with."""

    exit_code = 34


class SignatureError(ArtefactError):
    """A signature is missing, malformed or made by another key."""

    exit_code = 35


class SliceError(ArtefactError):
    """Slice values do not fit their specification (name, shape, dtype, finiteness)."""

    exit_code = 36
