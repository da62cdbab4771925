"""A task's local steps in the test's own process: each way to train beside another that must agree with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_runtime.data.batches import draw_batches
from edge_runtime.execution.prefix_cache import PrefixCache
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.slices import Values, encode_values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.gradient import estimate
from edge_runtime.training.loop import count_steps, train_locally
from edge_runtime.training.replay import SCALARS
from edge_runtime.training.tangents import draw_tangents
from edge_runtime.training.trainable import estimated_slices
from tests.edge_runtime.local import examples_of, train, work_of
from tests.export import tiny

ONCE = {"steps": 1, "batch_size": 8, "optimizer": LocalOptimizer("accumulate", 1.0, 1.0)}
LAST = "encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


def scalars_of(prepared: PreparedPackage, values: Values, **task: Any) -> np.ndarray:
    """The numbers (K, b) of a task's first step."""
    made = train(prepared, tiny.make_task(prepared.package, report="scalars", **task), values)
    return made.delta[SCALARS][0]


@pytest.mark.parametrize("update", ["forward", "zero_order"])
@pytest.mark.parametrize("slices", [(), (LAST,)])
def test_a_full_set_of_directions_makes_the_heads_exact_gradient(
    float_prepared, values, slices, update: Any
) -> None:
    """With as many orthogonal draws as there are dimensions, the perturbed head moves as the exact one does.

    The head has 3·64 + 3 = 195 dimensions, a core 16 more: 256 draws make a full set.
    """
    package = float_prepared.package
    exact = train(float_prepared, tiny.make_task(package, slices=slices, update="forward", **ONCE), values)
    task = tiny.make_task(
        package, slices=slices, head="perturbed", directions="orthogonal", draws=256, update=update, **ONCE
    )
    moved = train(float_prepared, task, values)
    assert list(moved.delta) == [*(f"{name}/core" for name in slices), "head/weight", "head/bias"]
    for name in ("head/weight", "head/bias"):
        error = np.abs(moved.delta[name] - exact.delta[name]).max()
        assert error < (1e-4 if update == "forward" else 2e-3) * np.abs(exact.delta[name]).max()


def test_a_perturbed_heads_derivative_is_the_sum_of_its_parts(float_prepared, values) -> None:
    """Slices and head moved together have the derivative of the slices alone plus that of the head alone.

    Directions per example: each example's numbers are compared.
    """
    together = scalars_of(float_prepared, values, head="perturbed", **ONCE)
    slices = scalars_of(float_prepared, values, train_head=False, **ONCE)
    head = scalars_of(float_prepared, values, head="perturbed", slices=(), **ONCE)
    assert together.shape == (2, 8)
    np.testing.assert_allclose(together, slices + head, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("difference", "head", "sizes", "factor"),
    [
        ("central", "exact", (0.4, 0.2, 0.1), 4.0),
        ("central", "perturbed", (0.02, 0.01), 4.0),
        ("forward", "exact", (0.1, 0.05, 0.025), 2.0),
        ("forward", "perturbed", (0.02, 0.01), 2.0),
    ],
)
def test_differences_close_in_on_the_derivative(
    float_prepared, values, difference: Any, head: Any, sizes: tuple[float, ...], factor: float
) -> None:
    """Half the step leaves a quarter of the error of a central difference, half of a forward one."""
    task = {"directions": "gaussian", "draws": 8, "steps": 1, "head": head}
    wanted = scalars_of(float_prepared, values, **task)
    settings = {**task, "update": "zero_order", "difference": difference}
    errors = [
        np.abs(scalars_of(float_prepared, values, difference_step=size, **settings) - wanted).mean()
        for size in sizes
    ]
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize(
    ("difference", "head", "passes"),
    [
        ("central", "perturbed", 6),
        ("central", "exact", 7),
        ("forward", "perturbed", 4),
        ("forward", "exact", 4),
    ],
)
def test_zero_order_makes_no_pass_too_many(
    float_prepared, values, monkeypatch, difference: Any, head: Any, passes: int
) -> None:
    """Three draws take two passes each, or one and a pass at the values, which the exact head needs anyway."""
    task = tiny.make_task(
        float_prepared.package,
        update="zero_order",
        directions="shared",
        draws=3,
        steps=1,
        difference=difference,
        head=head,
    )
    work, count = work_of(float_prepared, task, ExecutionChoice("resident", 4, 1)), 0
    executor = work.executor
    sweep = executor.sweep

    def counting(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        return sweep(*arguments, **more)

    monkeypatch.setattr(executor, "sweep", counting)
    trained = train_locally(work, values)
    assert trained.steps_applied == 1
    assert count == passes
    assert not any("_dot" in name for stage in executor._stages for name in stage.program.inputs)


def test_zero_order_finds_its_prefix_in_the_cache(float_prepared, values, tmp_path) -> None:
    """A task on the last block runs the first once a row, and changes what it changes without a cache."""
    task = tiny.make_task(
        float_prepared.package, slices=(LAST,), update="zero_order", directions="gaussian", draws=3, steps=2
    )
    choice = ExecutionChoice("resident", 1, 1)
    plain = train(float_prepared, task, values, choice)
    with PrefixCache(tmp_path, 1 << 24) as cache:
        cached = train_locally(work_of(float_prepared, task, choice, cache=cache), values)
        assert (cache.hits, cache.misses) == (
            2 * 4 * 7 - 8,
            8,
        )  # seven passes of four rows a step; eight rows
    assert encode_values(cached.delta) == encode_values(plain.delta)


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"),
    [(8, 0, 5), (8, 1, 2), (8, 2, 4), (8, 9, 5), (5, 1, 2), (3, 2, 2), (1, 1, 1), (9, 1, 3)],
)
def test_epochs_count_steps(float_prepared, rows: int, epochs: int, steps: int) -> None:
    """Passes over the rows, in batches of four or of all rows there are, rounded up, at most five steps."""
    task = tiny.make_task(float_prepared.package, steps=5, batch_size=4, epochs=epochs)
    assert count_steps(task, rows) == steps


def test_an_epoch_takes_every_row(float_prepared, values) -> None:
    """A device with six rows in batches of four does two steps of an epoch, and reports them."""
    examples = examples_of(float_prepared, tiny.SENTENCES[:6])
    task = tiny.make_task(float_prepared.package, steps=50, batch_size=4, epochs=1)
    trained = train(float_prepared, task, values, examples=examples)
    assert (trained.steps_applied, trained.examples) == (2, 8)
    batches = draw_batches(6, seed=task.seed, round_number=1, slot=0, steps=2, batch_size=4)
    assert {int(row) for batch in batches for row in batch} == set(range(6))


@pytest.fixture(scope="module")
def lora(exported_plain) -> tuple[PreparedPackage, Values]:
    """A package with LoRA slices of rank 2, and values away from zero."""
    prepared = PreparedPackage.as_stored(exported_plain.package)
    return prepared, tiny.flat(tiny.moved_slices(exported_plain.reference))


@pytest.mark.parametrize("update", ["forward", "zero_order"])
def test_a_frozen_a_stays_where_it_is(lora, update: Any) -> None:
    """Only B and the head change, and d counts B alone: a full set of directions of B gives its exact gradient."""
    prepared, start = lora
    name = next(spec.name for spec in prepared.manifest.slices if spec.kind == "lora")
    task = tiny.make_task(
        prepared.package,
        slices=(name,),
        freeze_a=True,
        update=update,
        directions="orthogonal",
        draws=128,  # B is 64 × 2
        difference_step=0.02,
        **ONCE,
    )
    (spec,) = estimated_slices(task, prepared.manifest.slices)
    assert [tensor.name for tensor in spec.tensors] == ["B"]
    assert spec.dimensions == 128
    got = train(prepared, task, start).delta
    assert set(got) == {f"{name}/B", "head/weight", "head/bias"}
    both = replace(task, freeze_a=False, directions="orthogonal", draws=256, update="forward")
    wanted = train(prepared, both, start).delta[f"{name}/B"]
    assert np.abs(got[f"{name}/B"] - wanted).max() < 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("directions", "update"),
    [("per_example", "forward"), ("shared", "forward"), ("shared", "zero_order")],
)
def test_derivatives_are_limited_before_the_estimate(
    float_prepared, values, directions: Any, update: Any
) -> None:
    """Each number is clamped, the estimate is made of the clamped ones, and the head's exact gradient is left alone."""
    limit = 0.03
    settings = {"directions": directions, "update": update, "draws": 4, **ONCE}
    free = scalars_of(float_prepared, values, **settings)
    assert np.abs(free).min() < limit < np.abs(free).max()
    got = scalars_of(float_prepared, values, jvp_limit=limit, **settings)
    assert np.array_equal(got, np.clip(free, np.float32(-limit), np.float32(limit)))
    task = tiny.make_task(float_prepared.package, jvp_limit=limit, **settings)
    delta = train(float_prepared, task, values).delta
    specs = estimated_slices(task, float_prepared.manifest.slices)
    made = estimate(got, draw_tangents(task, specs, 0, range(got.shape[1])))
    assert all(np.array_equal(delta[name], -gradient) for name, gradient in made.items())
    unlimited = train(float_prepared, replace(task, jvp_limit=None), values).delta
    assert np.array_equal(delta["head/weight"], unlimited["head/weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {"directions": "shared"},
        {"directions": "gaussian", "head": "perturbed"},
        {"head": "perturbed"},
        {"update": "zero_order", "directions": "gaussian", "head": "perturbed"},
    ],
    ids=["shared", "gaussian", "per example", "zero order"],
)
def test_how_examples_are_grouped_changes_last_digits_alone(float_prepared, values, settings: dict) -> None:
    """Whatever the micro-batch, an example keeps its direction; draws at a time change no bit."""
    task = tiny.make_task(float_prepared.package, draws=4, **{**ONCE, **settings})
    wanted = train(float_prepared, task, values, ExecutionChoice("resident", 8, 4)).delta
    at_a_time = train(float_prepared, task, values, ExecutionChoice("resident", 8, 3)).delta
    assert encode_values(at_a_time) == encode_values(wanted)
    for size in (1, 3):
        got = train(float_prepared, task, values, ExecutionChoice("resident", size, 2)).delta
        for name, array in wanted.items():
            assert np.abs(got[name] - array).max() < 2e-3 * np.abs(array).max(), name
