from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from edge_runtime.data.batches import Row, Tokenizer
from edge_runtime.data.examples import Examples
from edge_runtime.errors import ConfigError
from edge_runtime.package.prepared import PreparedPackage
from edge_runtime.package.ranked_values import cut
from edge_runtime.package.ranks import with_rank
from edge_runtime.protocol.messages import LocalOptimizer, Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.training.methods import check_method, check_rank_mode, check_task
from edge_runtime.training.replay import replay
from edge_runtime.training.step_rank import step_rank
from tests.edge_runtime.bigram import HIDDEN, SLICE, Bigram
from tests.edge_runtime.golden.tangents import TASK
from tests.edge_runtime.local import both_reports, train
from tests.edge_runtime.ranked_bigram import (
    RANK,
    A,
    B,
    prepare_here,
    start_values,
    write_ranked_bigram,
)

TEXTS = ("the cat sat home", "the dog ran", "cat sat", "the dog sat home")


@pytest.fixture(scope="module")
def bigram(tmp_path_factory: pytest.TempPathFactory) -> Bigram:
    folder = tmp_path_factory.mktemp("ranked")
    return write_ranked_bigram(folder, generate_key())


@pytest.fixture(scope="module")
def prepared(bigram: Bigram, tmp_path_factory: pytest.TempPathFactory) -> PreparedPackage:
    return prepare_here(bigram.package, tmp_path_factory.mktemp("prepared") / "it")


def examples_of(bigram: Bigram) -> Examples:
    tokenizer = Tokenizer(bigram.package.path("tokenizer.json"), 16)
    return Examples(tokenizer.encode([Row(text) for text in TEXTS], 2), None, 0, 16)


def make_task(**changes: object) -> Task:
    settings = {
        "slices": (SLICE,),
        "train_head": False,
        "steps": 1,
        "batch_size": 4,
        "draws": 64,
        "sequence_limit": 16,
        "directions": "orthogonal",
        "optimizer": LocalOptimizer("accumulate", 1.0, 1.0),
        "rank_mode": "dynamic",
        **changes,
    }
    return replace(TASK, **settings)


def moved_values() -> dict[str, np.ndarray]:
    values = start_values()
    return {**values, B: np.random.default_rng(9).standard_normal((1, HIDDEN, RANK)).astype(np.float32)}


def exact(bigram: Bigram, values: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The gradient of a slice of the first ranks, whose scale is RANK / rank, in closed form."""
    a, b, scale = values[A][0, :rank].astype(float), values[B][0, :, :rank].astype(float), RANK / rank
    batch = examples_of(bigram).batch(range(len(TEXTS)))
    of_core = bigram.gradients(batch, scale * (b @ a).T).mean(0)
    return {A: scale * b.T @ of_core.T, B: scale * of_core.T @ a.T}


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_frozen"])
@pytest.mark.parametrize("slot", [0, 1, 4])
def test_a_step_estimates_the_gradient_at_its_own_rank(
    bigram: Bigram, prepared: PreparedPackage, mode: str, slot: int
) -> None:
    """A full set of directions gives the exact gradient at the drawn rank and its scale, of the moved ranks alone."""
    task = make_task(slot=slot, rank_mode=mode)
    ranks = step_rank(task, prepared.manifest.slices, 0)
    assert ranks is not None
    delta = train(prepared, task, moved_values(), examples=examples_of(bigram)).delta
    wanted = exact(bigram, moved_values(), ranks.rank)
    moving = slice(ranks.rank - 1 if mode == "dynamic_frozen" else 0, ranks.rank)
    expected_a, expected_b = np.zeros((1, RANK, HIDDEN)), np.zeros((1, HIDDEN, RANK))
    expected_a[0, moving] = -wanted[A][moving]
    expected_b[0, :, moving] = -wanted[B][:, moving]
    np.testing.assert_allclose(delta[A], expected_a, atol=2e-5)
    np.testing.assert_allclose(delta[B], expected_b, atol=2e-5)
    assert not delta[A][expected_a == 0].any()


def test_ranks_are_drawn_evenly_and_by_key(prepared: PreparedPackage) -> None:
    """Over many steps each rank comes about as often, other slots draw others, and the same step draws the same."""
    specs = prepared.manifest.slices
    task = make_task(steps=600)
    drawn = [step_rank(task, specs, number).rank for number in range(600)]
    assert drawn == [step_rank(task, specs, number).rank for number in range(600)]
    assert drawn != [step_rank(replace(task, slot=9), specs, number).rank for number in range(600)]
    assert np.bincount(drawn)[1:].tolist() == pytest.approx([200] * RANK, abs=45)
    assert {step_rank(task, with_rank(prepared.manifest, 1).slices, n).rank for n in range(20)} == {1}
    assert step_rank(replace(task, rank_mode="fixed"), specs, 0) is None


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_frozen"])
@pytest.mark.parametrize("rank", [1, 2, 0])
def test_scalars_are_replayed_to_the_same_bits(
    bigram: Bigram, prepared: PreparedPackage, mode: str, rank: int
) -> None:
    """From a device's numbers the coordinator makes the change of its ranks again, step by step at the same ranks."""
    task = make_task(steps=5, draws=2, directions="one_slice", rank_mode=mode, rank=rank)
    seen = prepared.with_rank(rank)
    values = cut(moved_values(), seen.manifest.slices)
    weights, scalars = both_reports(seen, task, values, examples=examples_of(bigram))
    made = replay(task, seen.manifest.slices, values, scalars.delta)
    assert made[A].shape == (1, rank or RANK, HIDDEN)
    for name, change in weights.delta.items():
        assert change.tobytes() == made[name].tobytes()


def test_what_ranks_do_not_go_with_is_refused(prepared: PreparedPackage) -> None:
    """Filtered directions, a choice of estimators, local AdamW and slices of one rank are one clear line each."""
    for change, message in (
        ({"directions": "filtered"}, "take other directions"),
        ({"update": "best", "directions": "one_slice"}, 'take update = "forward"'),
    ):
        with pytest.raises(ConfigError, match=message):
            check_method(make_task(**change))
    for change, message in (
        ({"optimizer": LocalOptimizer("adamw")}, 'take "accumulate" or "sgd"'),
        ({"slices": ()}, 'take rank_mode = "fixed"'),
    ):
        task = make_task(**change)
        with pytest.raises(ConfigError, match=message):
            check_rank_mode(task, prepared.manifest, task.slices, task.optimizer)
    check_task(make_task(slices=()), prepared.manifest)  # a head that warms up
    (spec,) = prepared.manifest.slices
    other = replace(prepared.manifest, slices=(replace(spec, kind="lora_xs"),))
    with pytest.raises(ConfigError, match="is lora_xs; export it with --slice lora"):
        check_task(make_task(), other)


def test_zero_order_takes_the_same_ranks(bigram: Bigram, prepared: PreparedPackage) -> None:
    """Differences of losses at the drawn rank point where forward mode does, in the ranks that the step moves alone."""
    task = make_task(rank_mode="dynamic_frozen", difference_step=1e-2)
    forward = train(prepared, task, moved_values(), examples=examples_of(bigram)).delta
    zero = train(
        prepared, replace(task, update="zero_order"), moved_values(), examples=examples_of(bigram)
    ).delta
    for name, change in forward.items():
        np.testing.assert_allclose(zero[name], change, atol=2e-2 * max(1.0, float(np.abs(change).max())))
        assert np.array_equal(zero[name] == 0, change == 0)
