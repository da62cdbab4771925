"""What a command line asks to plan or profile: a package, a cap and a step's work, checked before anything runs.

All of this needs the manifest alone: no engine and no numpy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.config_file import parse_cap
from edge_runtime.engines.choice import engine_version
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import CapExceededError, ConfigError, PreparationError
from edge_runtime.figures import size, whole_size
from edge_runtime.memory.plan import Planner, Work
from edge_runtime.package.manifest import Manifest
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import AGAIN, Prepared, prepared_beside, read_prepared, stale_reason
from edge_runtime.protocol.messages import Update

#: Bounds beyond any sensible step, which catch a slip of the hand.
MAX_BATCH, MAX_DRAWS, MAX_STEPS, MAX_THREADS = 4096, 1024, 1_000_000, 256


@dataclass(frozen=True)
class PlanRequest:
    """A package, and what is asked of it.

    Attributes:
        package: the package, narrowed to the engine.
        cap_bytes: memory that the worker may take.
        work: size of a step's work. Its slices do not include the head, which is always trained by its exact gradient.
        prepared: the package as prepared for this machine; None if it is not.
        unprepared: reason why it is not prepared; empty if it is.
        engine: name of the engine that runs the programs.
    """

    package: Package
    cap_bytes: int
    work: Work
    prepared: Prepared | None
    unprepared: str
    engine: EngineName = "onnxruntime"

    def planner(self, floor_bytes: int = 0) -> Planner:
        """A planner for this package on this machine.

        Args:
            floor_bytes: resident memory of an empty worker, measured on the device; 0 takes the planner's constant.
        """
        if self.prepared is None:
            return Planner(self.package.manifest, None, floor_bytes)
        return Planner(
            self.package.manifest, self.prepared.arithmetic, floor_bytes, self.prepared.calibration
        )


def parse_request(
    folder: Path,
    cap: str,
    *,
    batch: int,
    sequence: int | None,
    draws: int,
    slices: str | None,
    update: Update,
    publisher_key: str | None,
    prepared_folder: Path | None,
    engine: EngineName = "onnxruntime",
) -> PlanRequest:
    """Open a package and check what is asked of it.

    Args:
        folder: path of the package folder.
        cap: size of the cap, as :func:`edge_runtime.config_file.parse_cap` reads it.
        batch: number of examples of a step.
        sequence: number of tokens; None takes the package's limit.
        draws: number of directions of each example.
        slices: names of the slices to train, with commas between them; None takes all.
        update: way to the slices' gradient; backpropagation makes no draws.
        publisher_key: public key that must have signed the package; None warns on standard error that nobody checked.
        prepared_folder: path of the prepared folder; None takes what lies beside the package
            (:func:`edge_runtime.package.prepared.prepared_beside`).
        engine: name of the engine that is to run the programs.

    Raises:
        ConfigError: an option is out of its limits; names the option and the limit.
        CapExceededError: the libraries alone take more than the cap.
        PreparationError: ``prepared_folder`` holds no package prepared for this machine.
        ArtefactError: the package cannot be read, is not signed by the key, or has no such slice.
    """
    cap_bytes = parse_cap(cap)
    check_range("--batch", batch, MAX_BATCH)
    check_range("--draws", draws, MAX_DRAWS)
    if update == "backprop" and draws != 1:
        raise ConfigError(f"--update backprop makes no draws: --draws is {draws}, leave it at 1")
    package = open_package(folder, publisher_key).for_engine(engine)
    manifest = package.manifest
    limit = manifest.sequence_limit
    if sequence is not None and not 1 <= sequence <= limit:
        raise ConfigError(f"--sequence is {sequence}; package {manifest.name} takes 1 to {limit} tokens")
    work = Work(batch, limit if sequence is None else sequence, draws, _trained(manifest, slices), update)
    prepared, unprepared = _find_prepared(package, prepared_folder, engine)
    request = PlanRequest(package, cap_bytes, work, prepared, unprepared, engine)
    _require_floor(request)
    return request


def check_range(option: str, value: int, largest: int) -> None:
    """Check an option's value.

    Raises:
        ConfigError: it is not within 1 to ``largest``; names the option.
    """
    if not 1 <= value <= largest:
        raise ConfigError(f"{option} is {value}; it may be 1 to {largest}")


def open_package(folder: Path, publisher_key: str | None) -> Package:
    """The package of a folder. Without a key, standard error says that its signature was not checked."""
    if publisher_key is not None:
        return Package.open(folder, publisher_key)
    package = Package.open_unsigned(folder)
    sys.stderr.write(
        f"note: the signature of {folder} was not checked; --publisher-key KEY checks it\n",
    )
    return package


def _trained(manifest: Manifest, slices: str | None) -> tuple[str, ...]:
    if slices is None:
        return tuple(spec.name for spec in manifest.slices if spec.kind != "head")
    names = dict.fromkeys(name.strip() for name in slices.split(","))
    specs = [manifest.slice_named(name) for name in names]
    return tuple(spec.name for spec in specs if spec.kind != "head")


def _find_prepared(package: Package, folder: Path | None, engine: EngineName) -> tuple[Prepared | None, str]:
    place = prepared_beside(package.folder) if folder is None else folder
    try:
        prepared = read_prepared(place)
    except PreparationError:
        if folder is not None:
            raise
        return None, "it is not prepared for this machine"
    reason = stale_reason(place, prepared, package.sha256, engine_version(engine))
    if reason is None:
        return prepared, ""
    if folder is not None:
        raise PreparationError(f"{place} {reason}; {AGAIN}")
    return None, f"{place} {reason}"


def _require_floor(request: PlanRequest) -> None:
    planner = request.planner()
    smallest = planner.smallest(request.work)
    if request.cap_bytes < smallest.peak.libraries_bytes:
        needed = planner.smallest_cap(request.work)
        raise CapExceededError(
            f"the cap is {size(request.cap_bytes)}, and Python with the libraries alone takes "
            f"{whole_size(smallest.peak.libraries_bytes)}; this work needs a cap of {whole_size(needed)}",
            required_bytes=needed,
            cap_bytes=request.cap_bytes,
        )
