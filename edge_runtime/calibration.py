"""One block of a package run on this machine: how long its programs take, and how exact its arithmetic is here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines import Array, Engine, LoadedProgram
from edge_runtime.errors import PreparationError
from edge_runtime.layout import lay_out
from edge_runtime.package import Arithmetic, Package, Program
from edge_runtime.prepared import Calibration, PreparedPackage
from edge_runtime.weights import MappedWeights

#: Rows and tokens of the runs, and how many are timed.
CALIBRATION_ROWS, CALIBRATION_TOKENS, CALIBRATION_RUNS = 1, 128, 5
#: Levels of int8 weights, and what keeps sums of two products of a saturating kernel within 16 bits.
FULL_LIMIT, HALF_LIMIT = 127, 63
#: The first block.
BLOCK = 1


def weight_limit(package: Package, engine: Engine) -> int:
    """127 if this CPU's int8 kernel is exact at the extremes, else 63."""
    activations = np.full((8, 64), 255, np.uint8)
    matrix = np.full((64, 32), FULL_LIMIT, np.int8)
    probe = engine.load(package.path(package.manifest.probe), {}, ("product",))
    product = probe.run({"x": activations, "matrix": matrix})["product"]
    exact = float(255 * FULL_LIMIT * 64)
    return FULL_LIMIT if bool(np.all(product == exact)) else HALF_LIMIT


def calibrate(
    package: Package, work: Path, engine: Engine, arithmetic: Arithmetic, limit: int, *, four_draws: bool
) -> tuple[NDArray[np.float32], Calibration]:
    """Run the first block's programs on seeded random values.

    Args:
        package: as exported. work: a folder for the block's weights; empty afterwards.
        engine: of this machine. arithmetic: to run in. limit: the largest level of int8 weights.
        four_draws: whether four draws may be run, which takes most memory; else their time is extrapolated.

    Returns:
        The primal program's output, (1, T, H), and the times.
    """
    segment = package.manifest.segments[BLOCK]
    if segment.dual is None:
        raise PreparationError(f"segment {segment.name} of the package has no dual program; export it again")
    work.mkdir()
    weights = _block_weights(package, work, arithmetic, limit)
    programs = {name: package.manifest.programs[name] for name in (segment.primal, segment.dual)}
    primal = _load(package, engine, programs[segment.primal], arithmetic, weights)
    output, primal_s = _time(package, primal, programs[segment.primal], arithmetic, weights, 1)
    del primal
    dual = _load(package, engine, programs[segment.dual], arithmetic, weights)
    _, dual_1_s = _time(package, dual, programs[segment.dual], arithmetic, weights, 1)
    dual_4_s = dual_1_s + 3 * max(0.0, dual_1_s - primal_s)
    if four_draws:
        _, dual_4_s = _time(package, dual, programs[segment.dual], arithmetic, weights, 4)
    shutil.rmtree(work)
    tokens = _tokens(package)
    return output["hidden"], Calibration(CALIBRATION_ROWS, tokens, primal_s, dual_1_s, dual_4_s)


def _block_weights(package: Package, work: Path, arithmetic: Arithmetic, limit: int) -> MappedWeights:
    layout = lay_out(package, work, BLOCK, arithmetic, limit)
    stored = PreparedPackage.as_stored(package).prepared
    files = {path.name: path.stat().st_size for path in work.iterdir()}
    segments = (*stored.segments[:BLOCK], layout)
    prepared = msgspec.structs.replace(stored, arithmetic=arithmetic, segments=segments, files=files)
    return MappedWeights(PreparedPackage(package, work, prepared), BLOCK)


def _load(
    package: Package, engine: Engine, program: Program, arithmetic: Arithmetic, weights: MappedWeights
) -> LoadedProgram:
    variant = program.variants[arithmetic]
    bound = {name: weights.arrays[name] for name in variant.bound}
    return engine.load(package.path(variant.file), bound, program.outputs)


def _time(
    package: Package,
    loaded: LoadedProgram,
    program: Program,
    arithmetic: Arithmetic,
    weights: MappedWeights,
    draws: int,
) -> tuple[dict[str, Array], float]:
    """Outputs of one run, and the shortest of some runs in seconds; the first only warms up."""
    feeds: dict[str, Array] = {name: weights.arrays[name] for name in program.variants[arithmetic].fed}
    feeds.update(_sample_inputs(package, program.inputs, draws))
    seconds = []
    for _ in range(CALIBRATION_RUNS + 1):
        started = time.perf_counter()
        outputs = loaded.run(feeds)
        seconds.append(time.perf_counter() - started)
    return outputs, min(seconds[1:])


def _tokens(package: Package) -> int:
    return min(CALIBRATION_TOKENS, package.manifest.sequence_limit)


def _sample_inputs(package: Package, names: Sequence[str], draws: int) -> dict[str, Array]:
    """Seeded inputs of a block: normal hidden values and tangents, normal slices, nothing masked."""
    generator = np.random.default_rng(0)
    tokens = _tokens(package)
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
        else:  # a mask that blocks add to their scores
            feeds[name] = np.zeros((CALIBRATION_ROWS, 1, tokens, tokens), np.float32)
            continue
        feeds[name] = generator.standard_normal(shape, dtype=np.float32)
    return feeds
