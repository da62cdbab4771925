from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.protocol.messages import Directions
from edge_runtime.training.gradient import estimate, head_gradient
from edge_runtime.training.tangents import draw_tangents
from tests.edge_runtime.golden.tangents import TASK

BATCH = 4


def spec_of(size: int) -> SliceSpec:
    return SliceSpec("s", "lora_xs", (0,), "t", (TensorSpec("core", (1, size), "core"),))


def gradients_of(size: int, batch: int = BATCH) -> np.ndarray:
    """Gradients of each example, (B, d): a common part and an own part."""
    generator = np.random.default_rng(size)
    return (generator.normal(size=size) + generator.normal(size=(batch, size))).astype(np.float32)


def estimates(size: int, draws: int, directions: Directions, steps: int) -> np.ndarray:
    """Independent estimates (steps, d) of the mean gradient, each from its own step's tangents."""
    gradients, specs = gradients_of(size), [spec_of(size)]
    task = replace(TASK, draws=draws, directions=directions)
    made = []
    for step in range(steps):
        tangents = draw_tangents(task, specs, step, range(BATCH))
        jvps = (tangents["s/core"] * gradients).sum(-1)
        made.append(estimate(jvps, tangents)["s/core"][0])
    return np.stack(made)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(draws=st.integers(1, 4), batch=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_an_estimate_is_the_mean_of_jvp_times_direction(draws, batch, rows, columns) -> None:
    """The estimate is 1/(K·B) times the sum written as a loop, for tensors of any shape."""
    generator = np.random.default_rng(draws)
    jvps = generator.normal(size=(draws, batch)).astype(np.float32)
    tangent = generator.choice([-1, 1], size=(draws, batch, rows, columns)).astype(np.float32)
    expected = sum(jvps[k, i] * tangent[k, i] for k in range(draws) for i in range(batch)) / (draws * batch)
    got = estimate(jvps, {"s/core": tangent})
    assert got["s/core"].shape == (1, rows, columns)
    assert got["s/core"].dtype == np.float32
    np.testing.assert_allclose(got["s/core"][0], expected, rtol=1e-5, atol=1e-6)


def test_tensors_are_estimated_side_by_side_as_they_are_alone() -> None:
    """However many tensors there are, each gets the very bits it gets alone; the head keeps its own shape."""
    generator = np.random.default_rng(1)
    jvps = generator.normal(size=(3, 4)).astype(np.float32)
    sizes = {"a/core": (2, 3), "b/A": (5,), "head/weight": (3, 2), "head/bias": (3,)}
    tangents = {n: generator.normal(size=(3, 4, *size)).astype(np.float32) for n, size in sizes.items()}
    together = estimate(jvps, tangents)
    for name, tangent in tangents.items():
        assert together[name].shape == (sizes[name] if name.startswith("head") else (1, *sizes[name]))
        assert np.array_equal(together[name], estimate(jvps, {name: tangent})[name])


def predicted_error(size: int, draws: int, directions: Directions) -> float:
    """Expected squared error as derived in the module's docstring."""
    gradients = gradients_of(size).astype(np.float64)
    if directions in ("shared", "gaussian"):
        return (
            (size + (1 if directions == "gaussian" else -1)) / draws * float((gradients.mean(0) ** 2).sum())
        )
    return (size - 1) / (draws * BATCH) * float((gradients**2).sum(-1).mean())


@pytest.mark.parametrize("directions", ["per_example", "shared", "gaussian"])
@pytest.mark.parametrize(("size", "draws"), [(2, 1), (16, 1), (16, 4), (48, 4), (48, 16)])
def test_the_squared_error_is_as_derived(directions: Directions, size: int, draws: int) -> None:
    """The mean of many estimates is the gradient, and their squared error is (d-1)/K times the stated norm, of
    normal directions (d+1)/K.

    N estimates: the mean's squared error is predicted/N, and exceeds 4 times that by chance of under 1e-3
    (a chi-square-like sum; fixed seed, so the test is deterministic). The measured squared error itself has
    a relative deviation of at most sqrt(2/N) for d = 2 (a square of one Gaussian-like entry), 4.5 % at 1,000;
    12 % allows for the heavier tail of one draw shared by the batch; a single normal direction has a heavier tail
    still, so that it gets four times the steps.
    """
    steps = 4000 if directions == "gaussian" else 1000
    made = estimates(size, draws, directions, steps).astype(np.float64)
    exact = gradients_of(size).astype(np.float64).mean(0)
    predicted = predicted_error(size, draws, directions)
    assert ((made.mean(0) - exact) ** 2).sum() < 4 * predicted / steps
    measured = ((made - exact) ** 2).sum(-1).mean()
    assert measured == pytest.approx(predicted, rel=0.12)


def test_a_slice_errs_by_its_own_gradient_alone() -> None:
    """One slice at a time, a slice errs by (d_s - 1)·S/(K·B) times its own squared gradient, whatever the others' are.

    The other's gradients are 30 times as large here: moved together, they would drown it. With K = 4 and S = 2 each
    example has two draws of each slice, so that no example's part is left to chance. 2,000 estimates.
    """
    large, small = 8, 16
    specs = [
        SliceSpec("large", "lora_xs", (0,), "t", (TensorSpec("core", (1, large), "core"),)),
        SliceSpec("small", "lora_xs", (0,), "t", (TensorSpec("core", (1, small), "core"),)),
    ]
    gradients = {
        "large/core": 30 * gradients_of(large).astype(np.float64),
        "small/core": gradients_of(small).astype(np.float64),
    }
    task = replace(TASK, draws=4, directions="one_slice", batch_size=BATCH)
    made = []
    for step in range(2000):
        tangents = draw_tangents(task, specs, step, range(BATCH))
        jvps = sum((tangents[name] * gradients[name]).sum(-1) for name in gradients)
        made.append(estimate(jvps.astype(np.float32), tangents)["small/core"][0])
    exact = gradients["small/core"].mean(0)
    error = float(((np.stack(made) - exact) ** 2).sum(-1).mean())
    own = float((gradients["small/core"] ** 2).sum(-1).mean())
    assert error == pytest.approx((small - 1) * 2 / (4 * BATCH) * own, rel=0.12)


def dealt_estimates(gradients: np.ndarray, slices: int, draws: int, seeds: int) -> np.ndarray:
    """Estimates (seeds, d) of one step along dealt directions, for gradients (B, d) cut into slices of equal size."""
    size = gradients.shape[1] // slices
    specs = [
        SliceSpec(f"s{i}", "lora_xs", (0,), "t", (TensorSpec("core", (1, size), "core"),))
        for i in range(slices)
    ]
    made = []
    for seed in range(seeds):
        task = replace(TASK, draws=draws, directions="dealt", seed=seed, batch_size=len(gradients))
        tangents = draw_tangents(task, specs, 1, range(len(gradients)))
        flat = np.concatenate([tangents[f"s{i}/core"] for i in range(slices)], axis=2)
        found = estimate((flat * gradients).sum(-1), tangents)
        made.append(np.concatenate([found[f"s{i}/core"][0] for i in range(slices)]))
    return np.stack(made)


@pytest.mark.parametrize(("slices", "size", "draws"), [(1, 16, 2), (3, 6, 2), (4, 8, 3)])
def test_dealt_directions_are_unbiased(slices: int, size: int, draws: int) -> None:
    """The mean over many seeds is the mean gradient, where slices are padded and decks are not dealt out too.

    The mean of N estimates misses by the estimates' own spread over √N; three times that bounds the miss.
    """
    gradients = gradients_of(slices * size)
    made = dealt_estimates(gradients, slices, draws, 2000).astype(np.float64)
    spread = made.var(axis=0).sum() / len(made)
    assert ((made.mean(0) - gradients.mean(0)) ** 2).sum() < 9 * spread


@pytest.mark.parametrize(("slices", "size", "draws"), [(1, 16, 4), (1, 13, 4), (2, 8, 4), (2, 8, 8)])
def test_dealt_directions_are_exact_where_examples_agree(slices: int, size: int, draws: int) -> None:
    """Of a loss that is linear, and the same for all examples, whole decks give the gradient, not an estimate.

    B·K/S is a multiple of the deck's n rows here, and the task's earlier step has dealt whole decks too. Of a slice cut
    from 16 to 13 columns the same holds. ``per_example`` errs by (d - 1)/(K·B) of it.
    """
    gradients = np.repeat(gradients_of(slices * size)[:1], BATCH, axis=0)
    made = dealt_estimates(gradients, slices, draws, 5)
    np.testing.assert_allclose(made, np.broadcast_to(gradients[0], made.shape), rtol=1e-4, atol=1e-5)


def test_dealt_directions_err_less_the_more_examples_agree() -> None:
    """Half a deck of a slice errs by n/V - 1 of its gradient where examples agree, independent ones by (d - 1)/V.

    V = 8 rows of n = d = 16. Where examples have nothing in common, dealing gains nothing.
    """
    agreeing = np.repeat(gradients_of(16)[:1], BATCH, axis=0)
    made = dealt_estimates(agreeing, 1, 2, 600).astype(np.float64)
    error = ((made - agreeing[0]) ** 2).sum(-1).mean() / (agreeing[0].astype(np.float64) ** 2).sum()
    assert error == pytest.approx(16 / 8 - 1, rel=0.15)


def test_one_entry_is_exact() -> None:
    """With d = 1 the error (d-1)/K vanishes: every estimate is the gradient."""
    made = estimates(1, 1, "per_example", 20)
    np.testing.assert_allclose(made, np.broadcast_to(gradients_of(1).mean(0), made.shape), rtol=1e-6)


@pytest.mark.parametrize(("size", "draws"), [(16, 16), (48, 64), (16, 32)])
def test_a_full_set_of_orthogonal_directions_gives_the_exact_gradient(size: int, draws: int) -> None:
    """K = n shared orthogonal directions, n the power of two not below d, leave no error but rounding."""
    made = estimates(size, draws, "orthogonal", 5)
    exact = gradients_of(size).mean(0)
    np.testing.assert_allclose(made, np.broadcast_to(exact, made.shape), rtol=1e-4, atol=1e-5)


def test_orthogonal_directions_err_less_than_independent_ones() -> None:
    """At half a full set the error is n/K - 1 times the norm instead of (d-1)/K: half as large."""
    exact = gradients_of(16).astype(np.float64).mean(0)
    errors = {
        kind: ((estimates(16, 8, kind, 400) - exact) ** 2).sum(-1).mean() for kind in ("orthogonal", "shared")
    }
    norm = (exact**2).sum()
    assert errors["orthogonal"] == pytest.approx((16 / 8 - 1) * norm, rel=0.15)
    assert errors["shared"] == pytest.approx(15 / 8 * norm, rel=0.15)


@pytest.mark.parametrize(("chosen", "draws"), [(slice(0, 1), 16), (slice(3, 4), 16), (slice(0, 3), 64)])
def test_the_programs_give_the_exact_gradient(exported, float_prepared, chosen: slice, draws: int) -> None:
    """Through a package: d = 16 with 16, and d = 48 with 64, orthogonal draws give backpropagation's gradient."""
    from edge_runtime.engines.onnxruntime_engine import OnnxEngine
    from edge_runtime.execution.executor import Executor
    from tests.export import tiny

    specs = [spec for spec in float_prepared.manifest.slices if spec.kind != "head"][chosen]
    batch = tiny.make_text_batch(float_prepared.package, tiny.SENTENCES[:4])
    task = tiny.make_task(float_prepared.package, draws=draws, directions="orthogonal")
    tangents = draw_tangents(task, specs, 0, range(4))
    slices = tiny.moved_slices(exported.reference)
    executor = Executor(float_prepared, OnnxEngine(), [spec.name for spec in specs])
    sweep = executor.sweep(tiny.flat(slices), [batch], [tangents])
    assert sweep.jvps is not None
    got = estimate(sweep.jvps, tangents)
    _, gradients = exported.reference.example_gradients(tiny.torch_batch(batch), slices)
    for name, gradient in tiny.flat(gradients).items():
        if name in got:
            exact = gradient.mean(0, keepdims=True)
            assert np.abs(got[name] - exact).max() < 1e-3 * np.abs(exact).max()
    assert len(got) == len(specs)


def test_the_head_gradient_is_autograds() -> None:
    """The closed form equals automatic differentiation of the mean cross-entropy."""
    import torch

    from export.model.heads import Head

    torch.manual_seed(0)
    head = Head(8, 3, "mean")
    with torch.no_grad():
        head.weight.normal_()
        head.bias.normal_()
    hidden, labels = torch.randn(5, 4, 8), torch.tensor([0, 1, 2, 1, 0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    loss, logits, residual, features = head(hidden, mask, labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    loss.mean().backward()
    got = head_gradient(residual.detach().numpy(), features.detach().numpy())
    np.testing.assert_allclose(got["head/weight"], head.weight.grad.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["head/bias"], head.bias.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_the_programs_head_gradient_is_autograds(exported, float_prepared) -> None:
    """Residual and features as the head program gives them make backpropagation's head gradient."""
    import torch

    from edge_runtime.engines.onnxruntime_engine import OnnxEngine
    from edge_runtime.execution.executor import Executor
    from tests.export import tiny

    batch = tiny.make_text_batch(float_prepared.package)
    slices = tiny.moved_slices(exported.reference)
    sweep = Executor(float_prepared, OnnxEngine()).sweep(tiny.flat(slices), [batch])
    got = head_gradient(sweep.residual, sweep.features)
    leaves = {name: slices[name].clone().requires_grad_() for name in ("head.weight", "head.bias")}
    loss = exported.reference.run(tiny.torch_batch(batch), {**slices, **leaves})["loss"].mean()
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        wanted = gradient.numpy()
        assert np.abs(got[name.replace(".", "/")] - wanted).max() < 1e-4 * np.abs(wanted).max()
