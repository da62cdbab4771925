"""Backpropagation on the engine: beside torch, however the work is done, and in a worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.data.batches import Batch
from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prefix_cache import PrefixCache
from edge_runtime.memory.plan import ExecutionChoice, WeightsMode
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.worker.jobs import TrainOutcome
from edge_runtime.worker.process import run_worker
from tests.edge_runtime.execution.test_executor import rows_of
from tests.edge_runtime.worker.test_main import data, delta_of, train_job, values  # noqa: F401 - fixtures
from tests.export import tiny

BLOCK_1 = "encoder.layer.1.attention.self.query"


def trained_in(prepared: PreparedPackage) -> list[str]:
    return [spec.name for spec in prepared.manifest.slices if spec.kind != "head"]


def as_vector(gradient: Values, names: list[str]) -> np.ndarray:
    return np.concatenate([gradient[name].ravel() for name in names])


@pytest.fixture(scope="module")
def slices(exported) -> Values:
    """Slice values away from zero, by flat name."""
    return tiny.flat(tiny.moved_slices(exported.reference))


@pytest.fixture(scope="module")
def batch(exported) -> Batch:
    """Eight examples of real text."""
    return tiny.make_text_batch(exported.package)


@pytest.fixture(scope="module")
def by_torch(exported, batch) -> tuple[np.ndarray, Values]:
    """Loss of each example, and the gradient of their mean, by autograd on the same quantised weights."""
    loss, gradients = exported.reference.example_gradients(
        tiny.torch_batch(batch), tiny.moved_slices(exported.reference)
    )
    mean = {name: gradient.mean(axis=0, keepdims=True) for name, gradient in tiny.flat(gradients).items()}
    return loss.numpy(), mean


@pytest.mark.parametrize(
    ("arithmetic", "limit", "cosine"), [("float", 1e-4, 0.999999), ("row_int8", 0.03, 0.99)]
)
def test_the_gradient_is_torchs(
    prepared_in, slices, batch, by_torch, arithmetic: str, limit: float, cosine: float
) -> None:
    """Loss and gradient of every slice equal autograd's: in float to rounding, in int8 in direction."""
    prepared = prepared_in[arithmetic]
    sweep, gradient = Backpropagation(prepared, OnnxEngine(), trained_in(prepared)).gradient(slices, [batch])
    loss, expected = by_torch
    assert set(gradient) == set(expected)
    got, wanted = (as_vector(each, sorted(expected)) for each in (gradient, expected))
    assert tiny.relative(sweep.loss, loss) < limit
    assert tiny.relative(got, wanted) < limit
    assert got @ wanted > cosine * np.linalg.norm(got) * np.linalg.norm(wanted)


@pytest.mark.parametrize("arithmetic", ["row_int8", "float"])
def test_where_weights_and_inputs_are_changes_no_bit(
    prepared_in, slices, batch, tmp_path, arithmetic: str
) -> None:
    """Resident or streamed, layer inputs in memory or on disk, with a prefix cache or not: the same gradient."""
    prepared, groups = prepared_in[arithmetic], [[0, 1, 2], [3, 4, 5], [6, 7]]
    batches = [rows_of(batch, group) for group in groups]

    def gradient(
        trained: list[str], mode: WeightsMode, folder: Path | None, cache: PrefixCache | None
    ) -> Values:
        executor = Backpropagation(prepared, OnnxEngine(), trained, mode, cache, folder)
        first = executor.gradient(slices, batches, groups)[1]
        again = executor.gradient(slices, batches, groups)[1]  # with the cache: all hits
        assert all(np.array_equal(first[name], again[name]) for name in first)
        return first

    ways: list[tuple[WeightsMode, Path | None]] = [
        ("resident", tmp_path),
        ("streamed", None),
        ("streamed", tmp_path),
    ]
    for trained in (trained_in(prepared), [BLOCK_1]):
        wanted = gradient(trained, "resident", None, None)
        for mode, folder in ways:
            got = gradient(trained, mode, folder, None)
            assert set(got) == set(wanted)
            assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    with PrefixCache(tmp_path, 1 << 24) as cache:
        got = gradient([BLOCK_1], "streamed", tmp_path, cache)
        assert cache.hits == 8
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_add_up(float_prepared, slices, batch) -> None:
    """However a batch is cut, the gradient is that of the mean over all its examples."""
    executor = Backpropagation(float_prepared, OnnxEngine(), trained_in(float_prepared))
    _, whole = executor.gradient(slices, [batch])
    _, cut = executor.gradient(slices, [rows_of(batch, group) for group in ([5], [0, 7, 2], [1, 3, 4, 6])])
    names = sorted(whole)
    assert tiny.relative(as_vector(cut, names), as_vector(whole, names)) < 1e-5


def test_only_what_is_trained_has_a_gradient(float_prepared, slices, batch) -> None:
    """Slices of earlier blocks, and others of the same block, are left out; those trained keep their values."""
    engine = OnnxEngine()
    _, everything = Backpropagation(float_prepared, engine, trained_in(float_prepared)).gradient(
        slices, [batch]
    )
    _, one = Backpropagation(float_prepared, engine, [BLOCK_1]).gradient(slices, [batch])
    assert list(one) == [f"{BLOCK_1}/core"]
    np.testing.assert_allclose(one[f"{BLOCK_1}/core"], everything[f"{BLOCK_1}/core"], rtol=1e-6)


def test_weights_behind_the_first_slice_are_read_twice(prepared_in, slices, batch) -> None:
    """A step reads a trained block's matrices once forwards and once back, where a forward sweep reads them once."""
    prepared = prepared_in["row_int8"]
    block = 4 * 64 * 64 + 2 * 64 * 128  # int8 matrices; scales, biases and norms come on top
    read = {}
    for name, trained in (("all", trained_in(prepared)), ("last", [BLOCK_1])):
        executor = Backpropagation(prepared, OnnxEngine(), trained)
        executor.gradient(slices, [batch])
        read[name] = executor.weights_read_bytes
    forward = Executor(prepared, OnnxEngine(), ())
    forward.sweep(slices, [batch])
    assert 2 * block < forward.weights_read_bytes < 3 * block
    assert 2 * block < read["all"] - forward.weights_read_bytes < 3 * block
    assert block < read["last"] - forward.weights_read_bytes < 1.5 * block


def test_a_package_without_adjoints_is_refused(exported_plain) -> None:
    """The message says which option of the exporter is missing."""
    prepared = PreparedPackage.as_stored(exported_plain.package)
    with pytest.raises(PackageError, match=r"no adjoint programs.*--with-adjoint"):
        Backpropagation(prepared, OnnxEngine(), trained_in(prepared))


def test_block_arithmetic_is_refused(prepared_in) -> None:
    """Repacked weights cannot be read transposed; the message names the arithmetics that can."""
    prepared = prepared_in["block_int8"]
    with pytest.raises(PackageError, match=r"prepared in block_int8.*row_int8 or float"):
        Backpropagation(prepared, OnnxEngine(), trained_in(prepared))


def test_the_head_alone_has_nothing_to_propagate_back_to(float_prepared) -> None:
    """Without a slice beside the head there is no backward sweep to make."""
    with pytest.raises(PackageError, match="needs a slice"):
        Backpropagation(float_prepared, OnnxEngine(), [])


@pytest.mark.parametrize(
    "choice",
    [
        ExecutionChoice("resident", 4, 1),
        ExecutionChoice("streamed", 4, 1, "disk"),
        ExecutionChoice("streamed", 4, 1),
    ],
)
def test_a_worker_takes_exact_steps(
    prepared_in,
    train_job,  # noqa: F811
    slices,
    by_torch,
    batch,
    choice: ExecutionChoice,
) -> None:
    """One step of plain descent over all rows changes slices and head by the rate times torch's gradient."""
    optimizer = LocalOptimizer("sgd", slice_rate=0.5, head_rate=0.25)
    job = train_job(
        prepared_in["float"],
        {"choice": choice},
        update="backprop",
        draws=1,
        steps=1,
        batch_size=8,
        optimizer=optimizer,
    )
    outcome = run_worker(job, TrainOutcome)
    assert outcome.plan.choice == choice
    assert (outcome.steps_applied, outcome.steps_skipped) == (1, 0)
    assert outcome.mean_loss == pytest.approx(by_torch[0].mean(), rel=1e-5)
    assert outcome.weights_read_bytes > 0
    delta = delta_of(job)
    for name, gradient in by_torch[1].items():
        np.testing.assert_allclose(delta[name], -0.5 * gradient, rtol=1e-3, atol=1e-6)
    assert np.abs(delta["head/weight"]).max() > 0


def test_backpropagation_learns_what_its_estimate_learns(prepared_in, train_job) -> None:  # noqa: F811
    """Over the same rows and steps the loss falls as far as with one forward draw a step, within a tenth."""
    ends = {}
    for update in ("forward", "backprop"):
        optimizer = LocalOptimizer("sgd", slice_rate=0.05, head_rate=0.05)
        settings = {"update": update, "draws": 1, "batch_size": 8, "optimizer": optimizer}
        few, many = (
            run_worker(train_job(prepared_in["row_int8"], None, steps=steps, **settings), TrainOutcome)
            for steps in (1, 20)
        )
        assert few.mean_loss is not None
        assert many.mean_loss is not None
        ends[update] = many.mean_loss - few.mean_loss
    assert ends["backprop"] < 0
    assert ends["backprop"] <= 0.9 * ends["forward"]


def test_a_step_that_is_not_finite_is_skipped(prepared_in, train_job) -> None:  # noqa: F811
    """A rate that blows the values up ends in skipped steps, counted, and a change that is finite."""
    optimizer = LocalOptimizer("sgd", slice_rate=1e6, head_rate=1e6)
    job = train_job(
        prepared_in["float"], None, update="backprop", draws=1, steps=12, batch_size=8, optimizer=optimizer
    )
    outcome = run_worker(job, TrainOutcome)
    assert outcome.steps_applied + outcome.steps_skipped == 12
    assert all(np.isfinite(array).all() for array in delta_of(job).values())


def test_draws_are_refused(train_job) -> None:  # noqa: F811
    """A task that asks for backpropagation and for draws is a slip, and told as one; nothing is written."""
    job = train_job(update="backprop", draws=2)
    with pytest.raises(ConfigError, match="makes no draws, so draws = 2 must be 1"):
        run_worker(job, TrainOutcome)
    assert not Path(job.delta_path).exists()
