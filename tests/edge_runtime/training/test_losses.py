"""The partially Huberised cross-entropy: its formula, its derivatives through programs, and what it is good for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.engines.onnxruntime_engine import OnnxEngine
from edge_runtime.execution.executor import Executor, Sweep
from edge_runtime.memory.plan import ExecutionChoice
from edge_runtime.package.slices import Values
from edge_runtime.protocol.messages import LocalOptimizer
from edge_runtime.training.losses import apply_loss, phuber, slopes
from edge_runtime.training.replay import SCALARS
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.local import train
from tests.export import tiny


@settings(max_examples=100, deadline=None, derandomize=True)
@given(p=st.floats(1e-6, 1.0), tau=st.floats(1.01, 100.0))
def test_the_loss_is_the_published_one(p: float, tau: float) -> None:
    """-log p above 1/τ and 1 + log τ - τp below it (Menon et al., ICLR 2020, equation 13), slope included."""
    loss, slope = phuber(np.array([-math.log(p)]), tau)
    straight = p >= 1 / tau
    assert loss[0] == pytest.approx(-math.log(p) if straight else 1 + math.log(tau) - tau * p, abs=1e-5)
    assert slope[0] == pytest.approx(1.0 if straight else tau * p, abs=1e-5)


@pytest.mark.parametrize("tau", [1.1, 2.0, 10.0, 1e6])
def test_value_and_slope_meet_at_the_knot(tau: float) -> None:
    """Just below and just above log τ loss and slope are equal up to the distance: C1."""
    knot, step = math.log(tau), 1e-6
    (left, right), (left_slope, right_slope) = phuber(np.array([knot - step, knot + step]), tau)
    assert right - left == pytest.approx(2 * step, abs=1e-6)
    assert left_slope == 1.0
    assert right_slope == pytest.approx(1.0, abs=2e-6)


def test_up_to_the_knot_it_is_cross_entropy_to_the_last_bit() -> None:
    """With τ beyond any probability's inverse nothing of a sweep changes; with cross_entropy nothing is even read."""
    generator = np.random.default_rng(0)
    loss, jvps, residual = (
        generator.uniform(0, 13, size).astype(np.float32) for size in ((50,), (2, 50), (50, 3))
    )
    sweep = Sweep(loss, jvps, residual=residual)
    same = apply_loss(replace(TASK, loss="phuber", phuber_tau=1e6), sweep)
    assert np.array_equal(same.loss, loss)
    assert np.array_equal(same.jvps, jvps)  # type: ignore[arg-type]
    assert np.array_equal(same.residual, residual)  # type: ignore[arg-type]
    assert apply_loss(TASK, sweep) is sweep
    assert slopes(TASK, loss) is None


def test_an_impossible_label_has_a_finite_loss_and_no_slope() -> None:
    """Where cross-entropy is infinite the loss is 1 + log τ and the example pulls at nothing."""
    loss, slope = phuber(np.array([np.inf], np.float32), 2.0)
    assert loss[0] == pytest.approx(1 + math.log(2))
    assert slope[0] == 0.0


def test_one_outlier_does_not_drag_the_minimum() -> None:
    """Ding's example: 99 points ask for a large w and one, 200 times as far, for a negative one.

    Logistic loss has its minimum where the outlier holds it, at 0; the Huberised loss gives the outlier up and goes
    on to the end of the grid (Ding & Vishwanathan, NeurIPS 2010, figure 1, with our own numbers).
    """
    grid = np.linspace(-2, 10, 1201)
    many, outlier = (np.logaddexp(0, -slope * grid) for slope in (1.0, -200.0))
    minima = {}
    for tau in (1e6, 2.0):
        total = 99 * phuber(many, tau)[0].astype(float) + phuber(outlier, tau)[0]
        minima[tau] = grid[total.argmin()]
    plain = 99 * many + outlier
    assert abs(grid[plain.argmin()]) < 0.02
    assert minima[2.0] == 10.0


def test_flipped_labels_cost_cross_entropy_its_accuracy() -> None:
    """With 40 % of all labels flipped, cross-entropy gets half of the clean labels right and the Huberised loss all.

    The points are Long and Servedio's (Machine Learning 78, 2010, section 4): a quarter with a large margin, a quarter
    that pull the plane round, and half that it then misses; here with their exact weights, so that nothing is drawn.
    """
    gamma = 1 / 24
    points = np.array([[1, 0], [gamma, 5 * gamma], [gamma, -gamma]])
    rows, labels = np.concatenate([points, points]), np.array([1, 1, 1, -1, -1, -1])
    weights = np.array([0.25, 0.25, 0.5, 0.25, 0.25, 0.5]) * np.where(labels > 0, 0.6, 0.4)
    clean = {}
    for name, tau in (("cross_entropy", None), ("phuber", 1.5)):
        plane = np.zeros(2)
        for _ in range(8000):
            margins = labels * (rows @ plane)
            slope = np.ones(6) if tau is None else phuber(np.logaddexp(0, -margins), tau)[1]
            plane += weights * slope * labels / (1 + np.exp(margins)) @ rows
        clean[name] = np.array([0.25, 0.25, 0.5])[points @ plane > 0].sum()
    assert clean == {"cross_entropy": 0.5, "phuber": 1.0}


@pytest.fixture(scope="module")
def values(exported) -> Values:
    """Slice and head values away from zero."""
    return tiny.flat(tiny.moved_slices(exported.reference))


#: Between the losses of the eight sentences: some are bent, some are not.
TAU = 3.0


def test_both_sides_of_the_knot_are_met(float_prepared, values) -> None:
    """The rows that the tests below train on have losses on both sides."""
    batch = tiny.make_text_batch(float_prepared.package)
    loss = Executor(float_prepared, OnnxEngine()).sweep(values, [batch]).loss
    assert (loss < math.log(TAU)).sum() >= 2
    assert (loss > math.log(TAU)).sum() >= 2


@pytest.mark.parametrize("head", ["exact", "perturbed"])
def test_directional_derivatives_are_those_of_the_bent_loss(float_prepared, values, head: Any) -> None:
    """Forward mode's derivatives of the Huberised loss equal its central differences."""
    task = tiny.make_task(
        float_prepared.package,
        loss="phuber",
        phuber_tau=TAU,
        head=head,
        directions="shared",
        draws=6,
        steps=1,
        batch_size=8,
        report="scalars",
    )
    forward = train(float_prepared, task, values).delta[SCALARS]
    differences = train(
        float_prepared, replace(task, update="zero_order", difference_step=2e-3), values
    ).delta[SCALARS]
    assert np.abs(differences - forward).max() < 2e-3 * np.abs(forward).max()


@pytest.mark.parametrize("choice_size", [8, 3])
def test_backpropagation_of_the_bent_loss_is_autograds(
    exported, float_prepared, values, choice_size: int
) -> None:
    """One exact step moves slices and head along torch's gradient of the Huberised loss, in groups of any size."""
    import torch

    task = tiny.make_task(
        float_prepared.package,
        loss="phuber",
        phuber_tau=TAU,
        update="backprop",
        draws=1,
        steps=1,
        batch_size=8,
        optimizer=LocalOptimizer("accumulate", 1.0, 1.0),
    )
    trained = train(float_prepared, task, values, ExecutionChoice("resident", choice_size, 1))
    slices = tiny.moved_slices(exported.reference)
    leaves = {name: slices[name].clone().requires_grad_() for name in slices}
    batch = tiny.torch_batch(tiny.make_text_batch(float_prepared.package))
    cross_entropy = exported.reference.run(batch, leaves)["loss"]
    bent = 1 + math.log(TAU) - TAU * torch.exp(-cross_entropy)
    loss = torch.where(cross_entropy <= math.log(TAU), cross_entropy, bent).mean()
    wanted = tiny.flat(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    assert trained.loss_sum / trained.examples == pytest.approx(float(loss.detach()), rel=1e-5)
    assert set(trained.delta) == set(wanted)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(-trained.delta[name], gradient, rtol=1e-3, atol=1e-6)
