"""Prepare a package for this machine: :func:`prepare`, readable top to bottom.

Which arithmetic? Each that the package offers runs one block here. Of those whose output stays close to float
arithmetic's, the one with the highest cosine of its jvps to the exact ones (the exporter measured it on real text)
per second wins: directional derivatives are averaged, so speed buys more of them (docs/decisions/0009-arithmetic.md).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.durable import rename_durably, write_durably
from edge_runtime.engines import Array, Engine
from edge_runtime.errors import DeviceError, PreparationError
from edge_runtime.package import (
    FLOAT_SUFFIX,
    INT8_SCALES_SUFFIX,
    INT8_SUFFIX,
    LEVELS_SUFFIX,
    SCALES_SUFFIX,
    Arithmetic,
    Package,
    TensorRef,
)
from edge_runtime.prepared import (
    PREPARED,
    PREPARED_VERSION,
    Calibration,
    Candidate,
    Prepared,
    PreparedPackage,
    PreparedSegment,
    cpu_type,
)
from edge_runtime.weights import MappedWeights

#: Rows and tokens of the block runs that choose an arithmetic and predict time.
CALIBRATION_ROWS, CALIBRATION_TOKENS, CALIBRATION_RUNS = 2, 128, 3
#: A block's output may differ from float arithmetic's by this, relative to its norm.
ERROR_LIMIT = 0.05
#: Levels of int8 weights, and what keeps sums of two products of a saturating kernel within 16 bits.
FULL_LIMIT, HALF_LIMIT = 127, 63
STORED_ZERO_POINT = 128
#: Rows of a matrix that are converted at a time: bounds the memory of preparing.
ROWS_AT_A_TIME = 64
TENSOR_ALIGNMENT_BYTES, PAGE_BYTES = 64, 4096


def prepare(
    package: Package, folder: Path, engine: Engine, arithmetic: Arithmetic | None = None
) -> PreparedPackage:
    """Make ``folder`` from a package, or leave what is there.

    Args:
        package: its files verified.
        folder: replaced as a whole, once everything is written.
        engine: of this machine.
        arithmetic: a choice made by the operator; None measures.

    Raises:
        PreparationError: the package does not offer the arithmetic, or none is accurate here.
        DeviceError: the disk is full, with both figures.
    """
    manifest = package.manifest
    if arithmetic is not None and arithmetic not in manifest.arithmetics:
        raise PreparationError(
            f"package {manifest.name} offers {', '.join(manifest.arithmetics)}, not {arithmetic}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(folder.parent) as work:
        # 1. Does this CPU's int8 kernel saturate?
        limit = _weight_limit(package, engine)
        # 2. Which arithmetic is best here?
        offered = manifest.arithmetics if arithmetic is None else (arithmetic,)
        measured = {name: _measure(package, work / name, engine, name, limit) for name in offered}
        candidates = _candidates(package, measured)
        chosen = arithmetic or _best(candidates)
        # 3. Lay out all weights in it.
        _require_space(package, work, chosen)
        final = work / "final"
        final.mkdir()
        segments = [_lay_out(package, final, index, chosen, limit) for index in range(len(manifest.segments))]
        prepared = Prepared(
            version=PREPARED_VERSION,
            package_sha256=package.sha256 or "0" * 64,
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


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the final one, removed whatever happens; a full disk becomes one clear line."""
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".prepare-") as name:
            yield Path(name)
    except OSError as error:
        raise DeviceError(
            f"cannot prepare the package in {parent}: {error.strerror or error}; "
            f"{shutil.disk_usage(parent).free >> 20} MiB are free there"
        ) from error


def _require_space(package: Package, work: Path, arithmetic: Arithmetic) -> None:
    item_bytes = {"row_int8": 1, "block_int8": 0, "float": 4}[arithmetic]
    needed = sum(
        int(np.prod(tensor.shape)) * item_bytes if _is_matrix(name, tensor) else PAGE_BYTES
        for segment in package.manifest.segments
        for name, tensor in segment.weights.items()
    )
    free = shutil.disk_usage(work).free
    if needed > free:
        raise DeviceError(
            f"preparing the package takes {needed >> 20} MiB, {free >> 20} MiB are free in {work.parent}; "
            "free some space or choose block_int8, which needs none"
        )


# --- measuring -----------------------------------------------------------------------------------------------


def _weight_limit(package: Package, engine: Engine) -> int:
    """127 if the int8 kernel is exact at the extremes, else 63."""
    activations = np.full((8, 64), 255, np.uint8)
    matrix = np.full((64, 32), FULL_LIMIT, np.int8)
    probe = engine.load(package.path(package.manifest.probe), {}, ("product",))
    product = probe.run({"x": activations, "matrix": matrix})["product"]
    exact = float(255 * FULL_LIMIT * 64)
    return FULL_LIMIT if bool(np.all(product == exact)) else HALF_LIMIT


def _measure(
    package: Package, work: Path, engine: Engine, arithmetic: Arithmetic, limit: int
) -> tuple[NDArray[np.float32], Calibration]:
    """Output of the second segment (the first block) on seeded random values, and how long its programs take."""
    work.mkdir()
    segment = package.manifest.segments[1]
    layout = _lay_out(package, work, 1, arithmetic, limit)
    prepared = Prepared(
        version=PREPARED_VERSION,
        package_sha256="0" * 64,
        engine="",
        cpu="",
        arithmetic=arithmetic,
        weight_limit=limit,
        candidates=(),
        calibration=Calibration(1, 1, 0.0, 0.0, 0.0),
        segments=(PreparedSegment(True, {}), layout),
        files={path.name: path.stat().st_size for path in work.iterdir()},
    )
    opened = PreparedPackage(package, work, prepared)
    weights = MappedWeights(opened, 1)
    output, seconds = None, {}
    for key, name, draws in (
        ("primal", segment.primal, 1),
        ("dual_1", segment.dual, 1),
        ("dual_4", segment.dual, 4),
    ):
        program = package.manifest.programs[name or segment.primal]
        variant = program.variants[arithmetic]
        loaded = engine.load(
            package.path(variant.file), {n: weights.arrays[n] for n in variant.bound}, program.outputs
        )
        feeds: dict[str, Array] = {n: weights.arrays[n] for n in variant.fed}
        feeds.update(_sample_inputs(package, program.inputs, draws))
        times = []
        for _ in range(CALIBRATION_RUNS + 1):
            started = time.perf_counter()
            outputs = loaded.run(feeds)
            times.append(time.perf_counter() - started)
        seconds[key] = min(times[1:])
        output = outputs["hidden"] if key == "primal" else output
    if output is None:
        raise PreparationError(f"segment {segment.name} of the package gives no hidden state")
    calibration = Calibration(
        CALIBRATION_ROWS, CALIBRATION_TOKENS, seconds["primal"], seconds["dual_1"], seconds["dual_4"]
    )
    return output, calibration


def _sample_inputs(package: Package, names: tuple[str, ...], draws: int) -> dict[str, Array]:
    """Seeded inputs of a block: normal hidden values and tangents, slices as they start, nothing masked."""
    generator = np.random.default_rng(0)
    tokens = min(CALIBRATION_TOKENS, package.manifest.sequence_limit)
    hidden = (CALIBRATION_ROWS, tokens, package.manifest.base.hidden_size)
    shapes = {t.input: t.shape for spec in package.manifest.slices for t in spec.tensors}
    feeds: dict[str, Array] = {}
    for name in names:
        stem = name.removesuffix("_dot")
        if stem in shapes:
            shape: tuple[int, ...] = shapes[stem]
            shape = shape if stem == name else (draws, CALIBRATION_ROWS, *shape[1:])
        elif stem == "hidden":
            shape = hidden if stem == name else (draws, *hidden)
        else:
            feeds[name] = np.zeros((CALIBRATION_ROWS, 1, tokens, tokens), np.float32)
            continue
        feeds[name] = generator.standard_normal(shape, dtype=np.float32)
    return feeds


def _candidates(
    package: Package, measured: Mapping[Arithmetic, tuple[NDArray[np.float32], Calibration]]
) -> tuple[Candidate, ...]:
    exact = measured["float"][0] if "float" in measured else None
    return tuple(
        Candidate(
            arithmetic=name,
            seconds=calibration.primal_s + calibration.dual_1_s,
            error=0.0 if exact is None else _relative(output, exact),
            jvp_cosine=package.manifest.self_checks[name].jvp_cosine
            if name in package.manifest.self_checks
            else 1.0,
        )
        for name, (output, calibration) in measured.items()
    )


def _relative(output: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(output - exact)) / max(float(np.linalg.norm(exact)), 1e-30)


def _best(candidates: tuple[Candidate, ...]) -> Arithmetic:
    accurate = [candidate for candidate in candidates if candidate.error < ERROR_LIMIT]
    if not accurate:
        raise PreparationError(
            "no arithmetic of the package is accurate on this CPU: "
            + ", ".join(f"{c.arithmetic} differs by {c.error:.2f}" for c in candidates)
        )
    return max(accurate, key=lambda candidate: candidate.jvp_cosine / candidate.seconds).arithmetic


# --- laying out weights --------------------------------------------------------------------------------------


def _is_matrix(name: str, tensor: TensorRef) -> bool:
    return name.endswith(LEVELS_SUFFIX) and len(tensor.shape) == 3


def _lay_out(
    package: Package, folder: Path, index: int, arithmetic: Arithmetic, limit: int
) -> PreparedSegment:
    """Write one segment's tensors in the arithmetic's layout, or refer to the package's where they are the same."""
    segment = package.manifest.segments[index]
    matrices = [name for name, tensor in segment.weights.items() if _is_matrix(name, tensor)]
    if arithmetic == "block_int8" or not matrices:
        return PreparedSegment(True, segment.weights)
    stored = MappedWeights(PreparedPackage.as_stored(package), index).arrays
    file = f"{segment.name}.bin"
    tensors: dict[str, TensorRef] = {}
    with (folder / file).open("w+b") as out:
        for name in matrices:
            stem = name.removesuffix(LEVELS_SUFFIX)
            levels, scales = stored[name], stored[stem + SCALES_SUFFIX]
            rows, columns = levels.shape[0], levels.shape[1] * levels.shape[2]
            if arithmetic == "float":
                reference = _reserve(out, file, "float32", (columns, rows))
                _write_float(out, reference, levels, scales)
                tensors[stem + FLOAT_SUFFIX] = reference
                continue
            row_scales = _row_scales(levels, scales, limit)
            reference = _reserve(out, file, "int8", (columns, rows))
            _write_int8(out, reference, levels, scales, row_scales)
            tensors[stem + INT8_SUFFIX] = reference
            tensors[stem + INT8_SCALES_SUFFIX] = _append(out, file, row_scales)
        converted = {*matrices, *(name.removesuffix(LEVELS_SUFFIX) + SCALES_SUFFIX for name in matrices)}
        for name in segment.weights:
            if name not in converted:
                tensors[name] = _append(out, file, stored[name])
        out.seek(0, 2)
        out.write(b"\0" * (-out.tell() % PAGE_BYTES))
    return PreparedSegment(False, tensors)


def _reserve(out: BinaryIO, file: str, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    out.seek(0, 2)
    out.write(b"\0" * (-out.tell() % TENSOR_ALIGNMENT_BYTES))
    reference = msgspec.convert(
        {"file": file, "offset": out.tell(), "dtype": dtype, "shape": shape}, TensorRef
    )
    out.write(bytes(0))
    out.truncate(out.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return reference


def _append(out: BinaryIO, file: str, array: NDArray[np.generic]) -> TensorRef:
    reference = _reserve(out, file, array.dtype.name, array.shape)
    out.seek(reference.offset)
    out.write(array.tobytes())
    return reference


def _dequantised(
    levels: NDArray[np.generic], scales: NDArray[np.generic]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Rows of the float32 matrix (N, K), a few at a time."""
    for start in range(0, levels.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, min(start + ROWS_AT_A_TIME, levels.shape[0]))
        factors = scales[rows].astype(np.float32)[:, :, None]
        blocks = (levels[rows].astype(np.float32) - STORED_ZERO_POINT) * factors
        yield rows, blocks.reshape(blocks.shape[0], -1)


def _row_scales(levels: NDArray[np.generic], scales: NDArray[np.generic], limit: int) -> NDArray[np.float32]:
    """max|w| / limit for each output; 1 for a row of zeros."""
    largest = np.empty(levels.shape[0], np.float32)
    for rows, matrix in _dequantised(levels, scales):
        largest[rows] = np.abs(matrix).max(axis=1)
    return np.where(largest == 0, np.float32(1), largest / np.float32(limit)).astype(np.float32)


def _write_int8(
    out: BinaryIO,
    reference: TensorRef,
    levels: NDArray[np.generic],
    scales: NDArray[np.generic],
    row_scales: NDArray[np.float32],
) -> None:
    target: NDArray[np.int8] = np.memmap(out, np.int8, "r+", reference.offset, reference.shape)
    for rows, matrix in _dequantised(levels, scales):
        target[:, rows] = np.rint(matrix / row_scales[rows, None]).astype(np.int8).T


def _write_float(
    out: BinaryIO, reference: TensorRef, levels: NDArray[np.generic], scales: NDArray[np.generic]
) -> None:
    target: NDArray[np.float32] = np.memmap(out, np.float32, "r+", reference.offset, reference.shape)
    for rows, matrix in _dequantised(levels, scales):
        target[:, rows] = matrix.T
