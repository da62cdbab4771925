"""A head over several blocks: its losses, directional derivatives and cotangents."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.backpropagation import Backpropagation
from edge_runtime.execution.executor import Executor
from edge_runtime.execution.prefix_cache import PrefixCache
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, shapes
from edge_runtime.protocol.messages import Pooling
from tests.edge_runtime.execution.test_executor import batch_of, rows_of, tangents_for

QUERY_0, QUERY_1 = (f"encoder.layer.{block}.attention.self.query" for block in (0, 1))


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice values away from zero, by flat name, with the package's own head."""
    from tests.export import tiny

    return tiny.flat(tiny.moved_slices(exported.reference))


def with_head(
    prepared: PreparedPackage, values: Values, pooling: Pooling = "mean"
) -> tuple[PreparedPackage, Values]:
    """The package with a head over all three outputs, and a head of random numbers among the values."""
    seen = prepared.with_head((0, 1, 2), pooling)
    random = np.random.default_rng(5)
    head = {
        name: random.standard_normal(shape).astype(np.float32) * 0.2
        for name, shape in shapes([seen.manifest.head]).items()
    }
    return seen, values | head


def test_over_the_last_block_alone_it_is_the_packages_own_head(float_prepared, values) -> None:
    """A head over the last block gives what the head's own program gives, derivatives included."""
    names, batch = [QUERY_0, QUERY_1], batch_of(float_prepared)
    tangents = [tangents_for(float_prepared, names, range(8))]
    own = Executor(float_prepared, OnnxEngine(), names).sweep(values, [batch], tangents)
    seen = float_prepared.with_head((2,), "package")
    beside = Executor(seen, OnnxEngine(), names).sweep(values, [batch], tangents)
    for field in ("loss", "jvps", "logits", "residual", "features"):
        np.testing.assert_allclose(getattr(beside, field), getattr(own, field), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "max"])
def test_derivatives_are_those_of_differences_and_of_the_exact_gradient(
    float_prepared, values, pooling
) -> None:
    """Along a direction, forward mode, a central difference of losses and the exact gradient agree."""
    seen, start = with_head(float_prepared, values, pooling)
    names, batch = [QUERY_0, QUERY_1], batch_of(float_prepared)
    tangents = {name: tangent[:1, :1] for name, tangent in tangents_for(seen, names, range(8)).items()}
    shared = {name: tangent.repeat(8, axis=1) for name, tangent in tangents.items()}
    forward = Executor(seen, OnnxEngine(), names).sweep(start, [batch], [shared])
    assert forward.jvps is not None

    plain, step = Executor(seen, OnnxEngine()), 1e-2
    there, back = (
        plain.sweep(start | {n: start[n] + sign * step * t[0] for n, t in tangents.items()}, [batch]).loss
        for sign in (1, -1)
    )
    difference = (there.astype(np.float64) - back) / (2 * step)
    np.testing.assert_allclose(forward.jvps[0], difference, rtol=0.02, atol=2e-3 * np.abs(difference).max())

    sweep, gradient = Backpropagation(seen, OnnxEngine(), names).gradient(start, [batch])
    exact = sum(float((gradient[name] * tangent[0]).sum()) for name, tangent in tangents.items())
    assert exact == pytest.approx(float(forward.jvps.mean()), rel=1e-4)
    np.testing.assert_allclose(sweep.loss, forward.loss, rtol=1e-6)


def test_a_prefix_that_the_head_reads_is_kept_too(float_prepared, values, tmp_path) -> None:
    """With a prefix cache, blocks before the first trained slice still reach the head, to the last bit."""
    seen, start = with_head(float_prepared, values)
    batch, groups = batch_of(float_prepared), [[0, 1, 2], [3, 4, 5, 6, 7]]
    batches = [rows_of(batch, group) for group in groups]
    tangents = [tangents_for(seen, [QUERY_1], group) for group in groups]
    plain = Executor(seen, OnnxEngine(), [QUERY_1]).sweep(start, batches, tangents)
    with PrefixCache(tmp_path, 1 << 24) as cache:
        executor = Executor(seen, OnnxEngine(), [QUERY_1], "streamed", cache)
        for _ in range(2):
            kept = executor.sweep(start, batches, tangents, groups)
            np.testing.assert_array_equal(kept.loss, plain.loss)
            np.testing.assert_array_equal(kept.jvps, plain.jvps)
        assert cache.hits == 8


def test_blocks_behind_the_last_one_read_do_not_run(float_prepared, values) -> None:
    """A head that reads the first block only runs nothing behind it."""
    whole = Executor(float_prepared.with_head((0, 1, 2), "mean"), OnnxEngine())
    short = Executor(float_prepared.with_head((1,), "mean"), OnnxEngine())
    start = with_head(float_prepared, values)[1]
    own = start | {"head/weight": start["head/weight"][:, :64]}
    whole.sweep(start, [batch_of(float_prepared)])
    short.sweep(own, [batch_of(float_prepared)])
    assert short.weights_read_bytes < 0.7 * whole.weights_read_bytes
