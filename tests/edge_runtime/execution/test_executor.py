from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.data.batches import Batch
from edge_runtime.engines.engine import Array, LoadedProgram
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import PackageError
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.memory.meter import mapped_bytes
from edge_runtime.memory.plan import WeightsMode, first_segment
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.training.tangents import draw_tangents

QUERY_0, VALUE_0, QUERY_1, VALUE_1 = (
    f"encoder.layer.{block}.attention.self.{name}" for block in (0, 1) for name in ("query", "value")
)
#: Frozen matrices of a block in float32: four of 64 × 64, two of 64 × 128.
BLOCK_BYTES = (4 * 64 * 64 + 2 * 64 * 128) * 4
FIELDS = ("loss", "jvps", "logits", "residual", "features")


@pytest.fixture(scope="module")
def values(exported):
    """Slice values away from zero, by flat name."""
    from tests.export import tiny

    return tiny.flat(tiny.moved_slices(exported.reference))


def batch_of(prepared: PreparedPackage) -> Batch:
    from tests.export import tiny

    return tiny.make_text_batch(prepared.package)


def tangents_for(prepared: PreparedPackage, names: Sequence[str], examples: Sequence[int], draws: int = 2):
    from tests.export import tiny

    specs = [prepared.manifest.slice_named(name) for name in names]
    return draw_tangents(tiny.make_task(prepared.package, draws=draws), specs, 0, examples)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, padded no further than they need."""
    width = int(batch.attention_mask[rows].sum(1).max())
    return Batch(batch.input_ids[rows, :width], batch.attention_mask[rows, :width], batch.labels[rows])


def test_packed_weights_change_no_bit(prepared_in, values) -> None:
    """Matrices that the engine packs once give the losses and logits that fed ones give, text by text."""
    prepared = prepared_in["row_int8"]
    batch = batch_of(prepared)
    packed, fed = Executor(prepared, OnnxEngine(), (), "packed"), Executor(prepared, OnnxEngine())
    assert len({id(stage.loaded) for stage in packed._stages}) > len(
        {id(stage.loaded) for stage in fed._stages}
    )
    for rows in ([0], [3, 1], list(range(8))):
        ours, theirs = (each.sweep(values, [rows_of(batch, rows)]) for each in (packed, fed))
        np.testing.assert_array_equal(ours.logits, theirs.logits)
        np.testing.assert_array_equal(ours.loss, theirs.loss)


@pytest.mark.parametrize(
    "groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[5, 0], [7, 1, 3]]]
)
def test_micro_batches_give_what_one_batch_gives(float_prepared, values, groups) -> None:
    """However a batch is cut, each example's results are the same, in the order of the micro-batches."""
    names = [QUERY_0, VALUE_1]
    executor, batch = Executor(float_prepared, OnnxEngine(), names), batch_of(float_prepared)
    whole = executor.sweep(values, [batch], [tangents_for(float_prepared, names, range(8))])
    cut = executor.sweep(
        values,
        [rows_of(batch, group) for group in groups],
        [tangents_for(float_prepared, names, group) for group in groups],
    )
    order = [row for group in groups for row in group]
    for field in FIELDS:
        wanted, got = getattr(whole, field), getattr(cut, field)
        wanted = wanted[:, order] if field == "jvps" else wanted[order]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arithmetic", ["row_int8", "block_int8"])
def test_int8_arithmetic_rounds_each_row_by_itself(prepared_in, values, arithmetic: str) -> None:
    """In int8, too, an example's results do not depend on its neighbours beyond float rounding."""
    prepared, names = prepared_in[arithmetic], [QUERY_0]
    executor, batch = Executor(prepared, OnnxEngine(), names), batch_of(prepared)
    whole = executor.sweep(values, [batch], [tangents_for(prepared, names, range(8))])
    one = executor.sweep(values, [rows_of(batch, [3])], [tangents_for(prepared, names, [3])])
    # A last-digit difference may move an activation to the next of 127 levels, here and there.
    np.testing.assert_allclose(one.loss, whole.loss[3:4], rtol=2e-2)
    np.testing.assert_allclose(one.jvps, whole.jvps[:, 3:4], rtol=0.1, atol=1e-2)


def test_slices_that_are_not_assigned_do_not_move(float_prepared, values) -> None:
    """Unassigned slices of dual segments take zero tangents: naming them with zeros changes nothing."""
    executor, batch = Executor(float_prepared, OnnxEngine(), [VALUE_0]), batch_of(float_prepared)
    given = tangents_for(float_prepared, [VALUE_0], range(8))
    explicit = {
        name: np.zeros((2, 8, 4, 4), dtype=np.float32)
        for name in (f"{QUERY_0}/core", f"{QUERY_1}/core", f"{VALUE_1}/core")
    }
    implicit = executor.sweep(values, [batch], [given])
    spelled = executor.sweep(values, [batch], [{**given, **explicit}])
    assert np.array_equal(implicit.jvps, spelled.jvps)
    assert np.abs(implicit.jvps).max() > 0


@pytest.mark.parametrize("trained", [[], ["head"]])
def test_without_moving_slices_there_are_no_jvps(float_prepared, values, trained: list[str]) -> None:
    """Evaluation and head-only training run primal programs: jvps is None, everything else is there."""
    got = Executor(float_prepared, OnnxEngine(), trained).sweep(values, [batch_of(float_prepared)])
    assert got.jvps is None
    assert got.loss.shape == (8,)
    assert got.logits.shape == got.residual.shape == (8, 3)
    assert got.features.shape == (8, 64)
    np.testing.assert_allclose(got.residual.sum(1), np.zeros(8), atol=1e-6)


def test_primal_and_dual_programs_agree_on_the_primal(float_prepared, values) -> None:
    """Carrying tangents does not change loss, logits, residual or features."""
    batch = batch_of(float_prepared)
    plain = Executor(float_prepared, OnnxEngine()).sweep(values, [batch])
    given = tangents_for(float_prepared, [QUERY_0], range(8))
    dual = Executor(float_prepared, OnnxEngine(), [QUERY_0]).sweep(values, [batch], [given])
    for field in ("loss", "logits", "residual", "features"):
        np.testing.assert_allclose(getattr(dual, field), getattr(plain, field), rtol=1e-5, atol=1e-5)


class RecordingEngine(OnnxEngine):
    """ONNX Runtime, noting what it loads and in which order programs run."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.runs: list[int] = []

    def load(self, program: Path, weights: Mapping[str, Array], outputs: Sequence[str]) -> LoadedProgram:
        number = len(self.loaded)
        self.loaded.append(program.stem)
        inner, runs = super().load(program, weights, outputs), self.runs

        class Noted:
            def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
                runs.append(number)
                return inner.run(inputs)

        return Noted()


PRIMAL = ["embedding.primal", "block_0.primal", "block_0.primal", "head.primal"]


@pytest.mark.parametrize(
    ("trained", "programs"),
    [
        ([], PRIMAL),
        ([QUERY_1], ["embedding.primal", "block_0.primal", "block_0.entry", "head.dual"]),
        ([QUERY_1, QUERY_0], ["embedding.primal", "block_0.entry", "block_0.dual", "head.dual"]),
        (["head"], PRIMAL),
    ],
)
def test_tangents_begin_at_the_first_trained_slice(float_prepared, values, trained, programs) -> None:
    """Segments before the first trained slice run primal, its own the entry, later ones the dual program."""
    engine = RecordingEngine()
    executor = Executor(float_prepared, engine, trained)
    moving = [name for name in trained if name != "head"]
    batch = batch_of(float_prepared)
    executor.sweep(values, [batch], [tangents_for(float_prepared, moving, range(8))] if moving else None)
    assert [engine.loaded[number].removesuffix(".float") for number in engine.runs] == programs
    assert executor.first_trained == first_segment(float_prepared.manifest, tuple(trained))


def test_each_segment_finishes_before_the_next_begins(float_prepared, values) -> None:
    """Segment-major order: every micro-batch passes a segment before any enters the next."""
    engine = RecordingEngine()
    batch = batch_of(float_prepared)
    Executor(float_prepared, engine).sweep(values, [rows_of(batch, [0, 1]), rows_of(batch, [2])])
    assert [engine.loaded[number].removesuffix(".float") for number in engine.runs] == [
        name for name in PRIMAL for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("arithmetic", "weights", "loads", "loads_of_a_sweep"),
    [
        ("float", "resident", 3, 0),
        ("row_int8", "resident", 3, 0),
        ("row_int8", "streamed", 3, 0),
        ("block_int8", "resident", 4, 0),
        ("block_int8", "streamed", 2, 2),
    ],
)
def test_one_load_serves_all_blocks_of_a_structure(
    prepared_in, values, arithmetic: str, weights: WeightsMode, loads: int, loads_of_a_sweep: int
) -> None:
    """Embedding, block and head are three loads where weights are inputs; bound ones take a load a block.

    Streamed, a bound block is loaded when it is its turn, and forgotten again.
    """
    engine = RecordingEngine()
    executor = Executor(prepared_in[arithmetic], engine, weights=weights)
    assert len(engine.loaded) == loads
    executor.sweep(values, [batch_of(prepared_in[arithmetic])])
    assert len(engine.loaded) == loads + loads_of_a_sweep


@pytest.mark.parametrize("arithmetic", ["float", "row_int8", "block_int8"])
def test_streamed_weights_give_the_same_bits(prepared_in, values, arithmetic: str) -> None:
    """Whether weights stay in memory or pass through it changes no bit, in a second sweep neither."""
    prepared, names = prepared_in[arithmetic], [QUERY_0, VALUE_1]
    batch, tangents = batch_of(prepared), tangents_for(prepared, names, range(8))
    sweeps = []
    modes: tuple[WeightsMode, ...] = ("resident", "streamed")
    for weights in modes:
        executor = Executor(prepared, OnnxEngine(), names, weights)
        sweeps += [executor.sweep(values, [batch], [tangents]) for _ in range(2)]
    for sweep in sweeps[1:]:
        for field in FIELDS:
            assert np.array_equal(getattr(sweep, field), getattr(sweeps[0], field))


def test_streamed_weights_are_given_back(float_prepared, values) -> None:
    """After a streamed sweep no page of the prepared folder is resident; after a resident one all blocks are."""
    folder, batch = float_prepared.folder, batch_of(float_prepared)
    resident = Executor(float_prepared, OnnxEngine())
    resident.sweep(values, [batch])
    assert mapped_bytes([folder])[0] >= 2 * BLOCK_BYTES
    del resident
    gc.collect()
    streamed = Executor(float_prepared, OnnxEngine(), weights="streamed")
    seen: list[int] = []
    streamed.observe = lambda _: seen.append(mapped_bytes([folder])[0])
    streamed.sweep(values, [batch])
    assert mapped_bytes([folder])[0] == 0
    # The two blocks, each alone: the kernel maps what it read ahead of a touched page only.
    assert all(BLOCK_BYTES <= size < 2 * BLOCK_BYTES for size in seen[1:3])


def test_an_unknown_slice_is_named(float_prepared) -> None:
    """Training a slice that the package does not have is a PackageError with its name."""
    with pytest.raises(PackageError, match="no slice 'nowhere'"):
        Executor(float_prepared, OnnxEngine(), ["nowhere"])


def test_values_move_the_results(float_prepared, values) -> None:
    """The slices are really read: another core gives another loss, and the zero state gives log(3)."""
    executor, batch = Executor(float_prepared, OnnxEngine()), batch_of(float_prepared)
    first: Sweep = executor.sweep(values, [batch])
    other = executor.sweep({**values, f"{QUERY_0}/core": values[f"{QUERY_0}/core"] + 1}, [batch])
    assert np.abs(first.loss - other.loss).max() > 1e-4
    zero = executor.sweep({name: np.zeros_like(value) for name, value in values.items()}, [batch])
    np.testing.assert_allclose(zero.loss, np.log(3), rtol=1e-6)
