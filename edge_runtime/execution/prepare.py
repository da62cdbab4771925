"""Prepare a package for this machine: :func:`prepare`, readable top to bottom.

Which arithmetic is best? Each that the package offers runs one block here. Those whose output stays close to float
arithmetic's are accurate. Among these the winner has the highest ratio of jvp cosine to time, where the jvp cosine is
that between its jvps and the exact ones, measured by the exporter on real text. Directional derivatives are averaged,
so speed buys more of them (docs/decisions/0009-arithmetic-and-weights.md).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.engines.engine import Engine
from edge_runtime.errors import DeviceError, PreparationError
from edge_runtime.execution.calibration import (
    CALIBRATION_ROWS,
    CALIBRATION_TOKENS,
    FULL_LIMIT,
    calibrate,
    weight_limit,
)
from edge_runtime.execution.layout import PAGE_BYTES, is_matrix, lay_out
from edge_runtime.figures import size
from edge_runtime.memory.plan import USABLE_SHARE, ExecutionChoice, Planner, Work, matrix_numbers
from edge_runtime.package.manifest import ARITHMETICS, BLOCK_ARITHMETICS, Arithmetic
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import (
    PREPARED,
    PREPARED_VERSION,
    Calibration,
    MeasuredArithmetic,
    Prepared,
    PreparedPackage,
    PreparedSegment,
    cpu_type,
)

#: Largest difference of a block's output from float arithmetic's, relative to its norm, that counts as accurate.
ERROR_LIMIT = 0.05
Measured = dict[Arithmetic, tuple[NDArray[np.float32], Calibration]]


def prepare(
    package: Package,
    folder: Path,
    engine: Engine,
    arithmetic: Arithmetic | None = None,
    cap_bytes: int | None = None,
) -> PreparedPackage:
    """Prepare a package into a folder. If that fails, the folder stays as it was.

    Args:
        package: the package, its files verified.
        folder: the prepared folder, replaced as a whole once everything is written.
        engine: this machine's engine.
        arithmetic: the operator's choice; None measures which is best.
        cap_bytes: memory cap of training; arithmetics that could not train under it are not considered. None considers
            all.

    Raises:
        PreparationError: the package does not offer the arithmetic, or none is accurate here.
        DeviceError: the disk is full; says how much is needed and how much is free.
    """
    manifest = package.manifest
    if arithmetic is not None and arithmetic not in manifest.arithmetics:
        raise PreparationError(
            f"package {manifest.name} offers {', '.join(manifest.arithmetics)}, not {arithmetic}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder.parent) as work:
        # 1. Does this CPU's int8 kernel saturate?
        limit = weight_limit(package, engine) if "row_int8" in manifest.arithmetics else FULL_LIMIT
        # 2. Which arithmetic is best here?
        measured: Measured = {}
        for name in _considered(package, cap_bytes) if arithmetic is None else (arithmetic,):
            four_draws = _fits(package, name, 4, cap_bytes)
            measured[name] = calibrate(package, work / name, engine, name, limit, four_draws=four_draws)
        candidates = _candidates(package, measured)
        chosen = arithmetic or _best(candidates)
        # 3. Lay out all weights in it.
        _require_space(package, work, chosen)
        final = work / "final"
        final.mkdir()
        segments: list[PreparedSegment] = []
        for index in range(len(manifest.segments)):
            owner = manifest.weights_owner(index)
            segments.append(
                segments[owner] if owner < index else lay_out(package, final, index, chosen, limit)
            )
        prepared = Prepared(
            version=PREPARED_VERSION,
            package_sha256=package.sha256,
            engine=engine.version,
            cpu=cpu_type(),
            arithmetic=chosen,
            weight_limit=limit,
            candidates=candidates,
            calibration=measured[chosen][1],
            segments=tuple(segments),
            files={path.name: path.stat().st_size for path in sorted(final.iterdir())},
        )
        write_durably(final / PREPARED, msgspec.json.encode(prepared))
        if folder.exists():
            shutil.rmtree(folder)
        rename_durably(final, folder)
    return PreparedPackage(package, folder, prepared)


def _considered(package: Package, cap_bytes: int | None) -> tuple[Arithmetic, ...]:
    """Arithmetics that could train here, by the package's own prediction; the first one if none could."""
    offered = package.manifest.arithmetics
    return tuple(name for name in offered if _fits(package, name, 1, cap_bytes)) or offered[:1]


def _fits(package: Package, arithmetic: Arithmetic, draws: int, cap_bytes: int | None) -> bool:
    """Whether the largest run of a calibration, a dual program with so many draws, fits the cap."""
    if cap_bytes is None:
        return True
    slices = tuple(spec.name for spec in package.manifest.slices if spec.kind != "head")
    sequence = min(CALIBRATION_TOKENS, package.manifest.sequence_limit)
    work = Work(CALIBRATION_ROWS, sequence, draws, slices)
    peak = Planner(package.manifest, arithmetic).predict(
        work, ExecutionChoice("streamed", CALIBRATION_ROWS, draws)
    )
    return peak.total_bytes <= cap_bytes * USABLE_SHARE


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the final one, removed whatever happens.

    Raises:
        DeviceError: the disk is full or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".prepare-") as name:
            yield Path(name)
    except OSError as error:
        raise DeviceError(
            f"cannot prepare the package in {parent}: {error.strerror or error}; "
            f"{size(shutil.disk_usage(parent).free)} are free there"
        ) from error


def _require_space(package: Package, work: Path, arithmetic: Arithmetic) -> None:
    if arithmetic in BLOCK_ARITHMETICS:
        return
    item_bytes = 1 if arithmetic == "row_int8" else 4
    needed = sum(
        matrix_numbers(name, segment) * item_bytes if is_matrix(name, tensor) else PAGE_BYTES
        for segment in package.manifest.segments
        for name, tensor in segment.weights.items()
    )
    free = shutil.disk_usage(work).free
    if needed > free:
        as_stored = [name for name in package.manifest.arithmetics if name in BLOCK_ARITHMETICS]
        raise DeviceError(
            f"preparing the package takes {size(needed)}, {size(free)} are free in {work.parent}; "
            f"free some space{f' or choose {as_stored[0]}, which needs none' if as_stored else ''}"
        )


def _candidates(
    package: Package, measured: Mapping[Arithmetic, tuple[NDArray[np.float32], Calibration]]
) -> tuple[MeasuredArithmetic, ...]:
    """All arithmetics that were measured, each compared with the most exact of them."""
    exact = measured[max(measured, key=ARITHMETICS.index)][0]
    checks = package.manifest.self_checks
    return tuple(
        MeasuredArithmetic(
            arithmetic=name,
            seconds=calibration.primal_s + calibration.dual_1_s,
            error=_relative(output, exact),
            jvp_cosine=checks[name].jvp_cosine if name in checks else 1.0,
        )
        for name, (output, calibration) in measured.items()
    )


def _relative(output: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(output - exact)) / max(float(np.linalg.norm(exact)), 1e-30)


def _best(candidates: tuple[MeasuredArithmetic, ...]) -> Arithmetic:
    accurate = [candidate for candidate in candidates if candidate.error < ERROR_LIMIT]
    if not accurate:
        raise PreparationError(
            "no arithmetic of the package is accurate on this CPU: "
            + ", ".join(f"{c.arithmetic} differs by {c.error:.2f}" for c in candidates)
        )
    return max(accurate, key=lambda candidate: candidate.jvp_cosine / candidate.seconds).arithmetic
