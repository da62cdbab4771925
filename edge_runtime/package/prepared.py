"""A package prepared for one machine: the arithmetic it runs in there, and its weights in that layout.

A package is prepared once, when it is installed (:mod:`edge_runtime.execution.prepare`). The prepared folder holds
``prepared.json`` and one file of weights for each block, laid out so that the engine can use the mapped pages as they
are. It belongs to one package, engine version and CPU type; where any of these differs it is made again and never used.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import msgspec
from msgspec import Struct

from edge_runtime.decoding import MALFORMED
from edge_runtime.engines.choice import engine_version
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import PreparationError
from edge_runtime.package.block_head import with_block_head
from edge_runtime.package.manifest import Arithmetic, PackagePath, Program, TensorRef, Variant
from edge_runtime.package.package import Package
from edge_runtime.package.ranks import with_rank
from edge_runtime.protocol.messages import Blocks, Bytes, Pooling, PositiveCount, Sha256, Text

PREPARED = "prepared.json"
PREPARED_VERSION = 1
MAX_PREPARED_BYTES = 16 << 20
#: What helps where a prepared folder is missing, damaged or made for something else.
AGAIN = "agents prepare the package by themselves, and so does 'edge-runtime profile' in its --prepared"
#: Machines that multiply signed activations with signed weights as they are, and turn the sign of one side if they
#: differ; x86-64 wants unsigned activations.
SIGNED_MACHINES = frozenset({"aarch64", "arm64"})
_CPU_INFO = Path("/proc/cpuinfo")
#: Lines of /proc/cpuinfo that tell CPU types apart, on x86-64 and on arm64.
_CPU_FIELDS = ("model name", "flags", "CPU implementer", "CPU part", "Features")


class MeasuredArithmetic(Struct, frozen=True):
    """One arithmetic, measured on this machine on one block of the package.

    Attributes:
        arithmetic: the arithmetic.
        seconds: time of the primal program plus the dual program with one draw, at the calibration's rows and tokens.
        error: relative difference of the block's output from that in the most exact arithmetic that was measured.
        jvp_cosine: jvp cosine of the package's own check, which was made on real text.
    """

    arithmetic: Arithmetic
    seconds: float
    error: float
    jvp_cosine: float


class Calibration(Struct, frozen=True):
    """Time that one block takes on this machine, from which plans predict time.

    Attributes:
        rows: number of rows of the run.
        tokens: number of tokens of each row.
        primal_s: seconds of the primal program.
        dual_1_s: seconds of the dual program with one draw.
        dual_4_s: seconds of the dual program with four draws.
        disturbed: whether other work on the machine kept the times from being true, after several tries.
    """

    rows: PositiveCount
    tokens: PositiveCount
    primal_s: float
    dual_1_s: float
    dual_4_s: float
    disturbed: bool = False


class PreparedSegment(Struct, frozen=True):
    """Where a segment's tensors lie.

    Attributes:
        in_package: whether they lie in files of the package instead of the prepared folder.
        tensors: place of each tensor, by name.
    """

    in_package: bool
    tensors: dict[Text, TensorRef]


class Prepared(Struct, frozen=True):
    """The content of ``prepared.json``.

    Attributes:
        version: version of this form.
        package_sha256: digest that names the package.
        engine: name and version of the engine.
        cpu: type of the CPU.
        arithmetic: arithmetic that was chosen.
        weight_limit: largest level of int8 weights: 127, or 63 where the CPU's kernel would saturate.
        candidates: all arithmetics that were measured.
        calibration: times measured in the chosen arithmetic.
        segments: place of each segment's tensors.
        files: size of each file of the prepared folder, in bytes.
    """

    version: PositiveCount
    package_sha256: Sha256
    engine: Text
    cpu: Text
    arithmetic: Arithmetic
    weight_limit: PositiveCount
    candidates: tuple[MeasuredArithmetic, ...]
    calibration: Calibration
    segments: tuple[PreparedSegment, ...]
    files: dict[PackagePath, Bytes]


class PreparedPackage:
    """A package with its prepared weights.

    Attributes:
        package: the package.
        manifest: the package's manifest, as a run sees it.
        folder: path of the prepared folder.
        prepared: content of its ``prepared.json``.
    """

    def __init__(self, package: Package, folder: Path, prepared: Prepared) -> None:
        self.package = package
        self.manifest = package.manifest
        self.folder = folder
        self.prepared = prepared

    def with_head(self, blocks: Blocks, pooling: Pooling) -> PreparedPackage:
        """The same as a run sees it whose head reads some blocks (:mod:`edge_runtime.package.block_head`).

        Raises:
            ConfigError: the package has no such blocks, or no head.
        """
        seen = PreparedPackage(self.package, self.folder, self.prepared)
        seen.manifest = with_block_head(self.manifest, blocks, pooling)
        return seen

    def with_rank(self, rank: int) -> PreparedPackage:
        """The same as a device sees it that holds the first ranks of its slices alone; 0 for all.

        Raises:
            ConfigError: the package has no such rank.
        """
        seen = PreparedPackage(self.package, self.folder, self.prepared)
        seen.manifest = with_rank(self.manifest, rank)
        return seen

    @classmethod
    def open(cls, package: Package, folder: Path, engine: str) -> PreparedPackage:
        """Open a prepared folder.

        Args:
            package: package that it was prepared from.
            folder: path of the prepared folder.
            engine: name and version of the engine in use, as ``Engine.version`` gives it.

        Raises:
            PreparationError: the folder is missing, damaged, or made for something else; says which.
        """
        prepared = read_prepared(folder)
        reason = stale_reason(folder, prepared, package.sha256, engine)
        if reason is not None:
            raise PreparationError(f"{folder} {reason}; {AGAIN}")
        if len(prepared.segments) != len(package.manifest.segments):
            raise PreparationError(f"{folder} has another number of segments; {AGAIN}")
        return cls(package, folder, prepared)

    @classmethod
    def as_stored(cls, package: Package) -> PreparedPackage:
        """A package with its own tensors, as the exporter stored them, in place of prepared ones."""
        segments = tuple(PreparedSegment(True, segment.weights) for segment in package.manifest.segments)
        nothing = Calibration(1, 1, 0.0, 0.0, 0.0)
        prepared = Prepared(
            PREPARED_VERSION,
            package.sha256,
            "",
            "",
            package.manifest.arithmetics[0],
            1,
            (),
            nothing,
            segments,
            {},
        )
        return cls(package, package.folder, prepared)

    def variant(self, program: Program, *, packed: bool = False) -> Variant:
        """The variant of a program in the arithmetic chosen for this machine, with activations of the sign it likes.

        Args:
            program: the program.
            packed: whether the one with packed weights is taken, where there is one.
        """
        chosen = program.variants[self.prepared.arithmetic]
        if packed:
            chosen = program.packed.get(self.prepared.arithmetic, chosen)
        if chosen.signed is None or platform.machine() not in SIGNED_MACHINES:
            return chosen
        return msgspec.structs.replace(chosen, file=chosen.signed)

    def weight_path(self, segment: int, file: str) -> tuple[Path, int]:
        """Path of a weight file of a segment, and the size in bytes that it must have."""
        if self.prepared.segments[segment].in_package:
            return self.package.path(file), self.manifest.files[file].bytes
        return self.folder / file, self.prepared.files[file]


def read_prepared(folder: Path) -> Prepared:
    """Parse ``prepared.json``.

    Raises:
        PreparationError: it is missing or malformed.
    """
    path = folder / PREPARED
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PREPARED_BYTES + 1)
        if len(data) > MAX_PREPARED_BYTES:
            raise PreparationError(f"{path} has more than {MAX_PREPARED_BYTES} bytes; {AGAIN}")
        return msgspec.json.decode(data, type=Prepared)
    except OSError as error:
        raise PreparationError(f"cannot read {path}: {error.strerror}; {AGAIN}") from error
    except MALFORMED as error:
        raise PreparationError(f"malformed {path}: {error}; {AGAIN}") from error


def stale_reason(folder: Path, prepared: Prepared, package_sha256: str, engine: str) -> str | None:
    """Reason why a prepared folder cannot be used here; None if it can."""
    if prepared.version != PREPARED_VERSION:
        return f"was prepared in form {prepared.version}, this program reads {PREPARED_VERSION}"
    if prepared.package_sha256 != package_sha256:
        return "was prepared from another package"
    if prepared.engine != engine:
        return f"was prepared for {prepared.engine}, this is {engine}"
    if prepared.cpu != cpu_type():
        return f"was prepared for the CPU {prepared.cpu}, this is {cpu_type()}"
    for name, size in prepared.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"lacks {name}, or it is not {size} bytes long"
    return None


def is_current(
    folder: Path,
    package_sha256: str,
    arithmetic: Arithmetic | None = None,
    engine: EngineName = "onnxruntime",
) -> bool:
    """Whether a folder holds this package, prepared for this machine and engine.

    Args:
        folder: path of the prepared folder.
        package_sha256: digest that names the package.
        arithmetic: arithmetic that it must be prepared in; None takes any.
        engine: name of the engine.

    Raises:
        ConfigError: the engine is not installed.
    """
    try:
        prepared = read_prepared(folder)
    except PreparationError:
        return False
    if arithmetic not in (None, prepared.arithmetic):
        return False
    return stale_reason(folder, prepared, package_sha256, engine_version(engine)) is None


def prepared_beside(package_folder: Path) -> Path:
    """Path of a prepared folder that is not named: beside the package, with ``-prepared`` added to its name."""
    resolved = package_folder.resolve()
    return resolved.with_name(f"{resolved.name}-prepared")


def cpu_type() -> str:
    """Type of the CPU, by which kernels are chosen: machine, model and a digest of its instruction sets."""
    found: dict[str, str] = {}
    try:
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _CPU_FIELDS:
                found.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.machine()
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]
    return f"{platform.machine()} {found.get('model name', found.get('CPU part', ''))} {digest}"
