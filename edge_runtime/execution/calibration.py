"""One block of a package, run on this machine: how long its programs take, and how exact its arithmetic is here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.engine import Array, Engine, LoadedProgram
from edge_runtime.errors import PreparationError
from edge_runtime.execution.layout import lay_out
from edge_runtime.execution.weights import MappedWeights
from edge_runtime.package.manifest import Arithmetic, Program
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import Calibration, PreparedPackage
from edge_runtime.package.ranks import fed_shape

#: Number of rows and tokens of a run, and of runs that are timed.
CALIBRATION_ROWS, CALIBRATION_TOKENS, CALIBRATION_RUNS = 1, 128, 5
#: How often all programs are timed anew while their times cannot be true.
CALIBRATION_TRIES = 4
#: A dual program does all that its primal does, and more with each draw; this many times its work would be too much.
#: Measured ratios are 2.0 to 2.4 for one draw and 4.1 to 5.0 for four (docs/results/memory.md).
LARGEST_RATIOS = (5.0, 12.0)
#: Largest level of int8 weights, and the one that keeps a saturating kernel's sums of two products within 16 bits.
FULL_LIMIT, HALF_LIMIT = 127, 63
#: Random tokens are drawn from the first ids, which every vocabulary has.
SAMPLE_VOCABULARY = 32


def weight_limit(package: Package, engine: Engine) -> int:
    """Largest level of int8 weights: 127 if this CPU's int8 kernel is exact at the extremes, else 63."""
    activations = np.full((8, 64), 255, np.uint8)
    matrix = np.full((64, 32), FULL_LIMIT, np.int8)
    probe = engine.load(package.path(package.manifest.probe), {}, ("product",))
    product = probe.run({"x": activations, "matrix": matrix})["product"]
    exact = float(255 * FULL_LIMIT * 64)
    return FULL_LIMIT if bool(np.all(product == exact)) else HALF_LIMIT


def calibrate(
    package: Package, work: Path, engine: Engine, arithmetic: Arithmetic, limit: int, *, four_draws: bool
) -> tuple[NDArray[np.float32], Calibration]:
    """Time the programs of the first block that may carry tangents. Its input is the embedding of seeded random tokens.

    Args:
        package: the package, as exported.
        work: folder for the block's weights, made and removed here.
        engine: this machine's engine.
        arithmetic: arithmetic in which to run the block.
        limit: largest level of int8 weights.
        four_draws: whether four draws may be run, which takes the most memory; otherwise their time is extrapolated.

    Returns:
        The primal program's output, (1, T, H), and the times.
    """
    block = _first_dual_block(package)
    segment = package.manifest.segments[block]
    work.mkdir()
    prepared = _two_segments(package, work, block, arithmetic, limit)
    flow = _embedded(prepared, engine)
    weights = MappedWeights(prepared, block)
    dual_name = str(segment.dual)
    programs = {name: package.manifest.programs[name] for name in (segment.primal, dual_name)}
    primal = _load(prepared, engine, programs[segment.primal], weights)
    output, _ = _time(prepared, primal, programs[segment.primal], weights, flow, 1)
    del primal

    def measure() -> tuple[float, float, float]:
        primal = _load(prepared, engine, programs[segment.primal], weights)
        _, primal_s = _time(prepared, primal, programs[segment.primal], weights, flow, 1)
        del primal  # one program at a time is in memory
        dual = _load(prepared, engine, programs[dual_name], weights)
        _, dual_1_s = _time(prepared, dual, programs[dual_name], weights, flow, 1)
        if not four_draws:
            return primal_s, dual_1_s, dual_1_s + 3 * max(0.0, dual_1_s - primal_s)
        return primal_s, dual_1_s, _time(prepared, dual, programs[dual_name], weights, flow, 4)[1]

    times, disturbed = settle(measure)
    shutil.rmtree(work)
    return output["hidden"], Calibration(CALIBRATION_ROWS, _tokens(package), *times, disturbed)


def settle(measure: Callable[[], tuple[float, float, float]]) -> tuple[tuple[float, float, float], bool]:
    """Times that can be true, measured anew while they cannot: other work on the machine lengthens some and not others.

    Args:
        measure: function that times the primal program and the dual ones with one and four draws, in seconds.

    Returns:
        The shortest time seen of each; and whether they still cannot be true after ``CALIBRATION_TRIES``. Then a
        program's time is raised to that of the smaller one, so that more work is never predicted to take less time.
    """
    shortest = measure()
    for _ in range(CALIBRATION_TRIES - 1):
        if _can_be_true(*shortest):
            return shortest, False
        primal_s, dual_1_s, dual_4_s = map(min, shortest, measure())
        shortest = (primal_s, dual_1_s, dual_4_s)
    if _can_be_true(*shortest):
        return shortest, False
    primal_s, dual_1_s, dual_4_s = shortest
    dual_1_s = max(primal_s, dual_1_s)
    return (primal_s, dual_1_s, max(dual_1_s, dual_4_s)), True


def _can_be_true(primal_s: float, dual_1_s: float, dual_4_s: float) -> bool:
    one, four = (most * primal_s for most in LARGEST_RATIOS)
    return primal_s <= dual_1_s <= one and dual_1_s <= dual_4_s <= four


def _first_dual_block(package: Package) -> int:
    """Index of the first block that may carry tangents; blocks before the first slice never do.

    Raises:
        PreparationError: there is no such block.
    """
    segments = package.manifest.segments
    for index, segment in enumerate(segments[:-1]):
        if segment.dual is not None:
            return index
    raise PreparationError(f"no block of package {package.manifest.name} has a dual program; export it again")


def _two_segments(
    package: Package, work: Path, block: int, arithmetic: Arithmetic, limit: int
) -> PreparedPackage:
    """The embedding and one block, laid out in an arithmetic.

    The embedding also fills the places of the blocks in between.
    """
    embedding = lay_out(package, work, 0, arithmetic, limit)
    laid_out = (*[embedding] * block, lay_out(package, work, block, arithmetic, limit))
    stored = PreparedPackage.as_stored(package).prepared
    files = {path.name: path.stat().st_size for path in work.iterdir()}
    prepared = msgspec.structs.replace(stored, arithmetic=arithmetic, segments=laid_out, files=files)
    return PreparedPackage(package, work, prepared)


def _embedded(prepared: PreparedPackage, engine: Engine) -> dict[str, Array]:
    """Outputs of the embedding for random tokens without padding: hidden states, masks, rotary tables."""
    manifest = prepared.manifest
    program = manifest.programs[manifest.segments[0].primal]
    variant = prepared.variant(program)
    weights = MappedWeights(prepared, 0, variant.gathered)
    tokens = _tokens(prepared.package)
    ids = np.random.default_rng(0).integers(0, SAMPLE_VOCABULARY, (CALIBRATION_ROWS, tokens), dtype=np.int64)
    flow: dict[str, Array] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for name, rows in variant.gathered.items():
        weights.gather(name, flow[rows])
    feeds = {name: weights.arrays[name] for name in variant.fed} | {
        name: flow[name] for name in program.inputs
    }
    return _load(prepared, engine, program, weights).run(feeds)


def _load(
    prepared: PreparedPackage, engine: Engine, program: Program, weights: MappedWeights
) -> LoadedProgram:
    variant = prepared.variant(program)
    bound = {name: weights.arrays[name] for name in variant.bound}
    return engine.load(prepared.package.path(variant.file), bound, program.outputs)


def _time(
    prepared: PreparedPackage,
    loaded: LoadedProgram,
    program: Program,
    weights: MappedWeights,
    flow: Mapping[str, Array],
    draws: int,
) -> tuple[dict[str, Array], float]:
    """Outputs of one run, and the shortest of ``CALIBRATION_RUNS`` in seconds. One run before them warms up."""
    feeds: dict[str, Array] = {name: weights.arrays[name] for name in prepared.variant(program).fed}
    feeds.update(_sample_inputs(prepared.package, program.inputs, flow, draws))
    seconds = []
    for _ in range(CALIBRATION_RUNS + 1):
        started = time.perf_counter()
        outputs = loaded.run(feeds)
        seconds.append(time.perf_counter() - started)
    return outputs, min(seconds[1:])


def _tokens(package: Package) -> int:
    return min(CALIBRATION_TOKENS, package.manifest.sequence_limit)


def _sample_inputs(
    package: Package, names: Sequence[str], flow: Mapping[str, Array], draws: int
) -> dict[str, Array]:
    """Inputs of a block: the outputs of the embedding, and seeded normal slices and tangents."""
    generator = np.random.default_rng(0)
    shapes = {t.input: fed_shape(t) for spec in package.manifest.slices for t in spec.tensors}
    feeds: dict[str, Array] = {}
    for name in names:
        stem = name.removesuffix("_dot")
        if name in flow:
            feeds[name] = flow[name]
            continue
        shape = shapes[stem] if stem in shapes else flow[stem].shape
        if stem != name:
            shape = (draws, CALIBRATION_ROWS, *shape[1:])
        feeds[name] = generator.standard_normal(shape, dtype=np.float32)
    return feeds
