"""Rows of a weight: chosen without bias, with less noise by norm, and folded so that the function stays."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.rows import chosen_anew, measured, placed
from coordinator.aggregation.server_optimizers import Moments, step
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import server_update
from coordinator.config import RunConfig, ServerOptimizerConfig, run_config
from edge_runtime.errors import ConfigError
from edge_runtime.package.slices import Values
from tests.edge_runtime.rows_bigram import COUNT, MOVED, PLACE, ROWS, SPEC, start_values

#: A gradient of twelve rows whose norms differ by a hundred times, as a layer's do.
GRADIENT = np.random.default_rng(4).standard_normal((12, 5)) * np.geomspace(0.03, 3, 12)[:, None]
SIDE = 6


def estimates(choice: str, count: int, samples: int) -> np.ndarray:
    """Pᵀ·P·G for many draws of P, by norms that are known."""
    chance = np.random.default_rng(1)
    scores = np.square(GRADIENT).sum(1)
    found = []
    for _ in range(samples):
        place = placed(scores, choice, chance.random(count))[0].astype(np.float64)
        found.append(place @ (place.T @ GRADIENT))
    return np.array(found)


@pytest.mark.parametrize("choice", ["norm", "uniform"])
def test_the_mean_over_many_choices_is_the_whole_gradient(choice: str) -> None:
    """Drawn rows at their scale have the gradient as their mean: within 2 % over 20,000 choices."""
    mean = estimates(choice, 4, 20_000).mean(0)
    assert np.linalg.norm(mean - GRADIENT) < 0.02 * np.linalg.norm(GRADIENT)


def test_a_choice_by_norm_has_less_error_than_a_uniform_one() -> None:
    """By norm the mean squared error is ((Σ‖G_i‖)² - ‖G‖²) / r, uniformly (m‖G‖² - ‖G‖²) / r: as derived, and less."""
    norms, square, count = np.linalg.norm(GRADIENT, axis=1), np.square(GRADIENT).sum(), 4
    by_norm, uniform = (
        np.square(estimates(choice, count, 20_000) - GRADIENT).sum((1, 2)).mean()
        for choice in ("norm", "uniform")
    )
    assert by_norm == pytest.approx((norms.sum() ** 2 - square) / count, rel=0.05)
    assert uniform == pytest.approx((len(norms) - 1) * square / count, rel=0.05)
    assert by_norm < uniform


def test_topk_takes_the_rows_of_highest_score_as_they_are() -> None:
    """The largest rows once each at scale 1; rows that nobody has measured count as the mean of the others."""
    place = placed(np.array([4.0, 1.0, np.nan, 9.0, 0.0]), "topk", np.array([0.3, 0.9]))[0]
    assert place.T.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    third = placed(np.array([4.0, 1.0, np.nan, 9.0, 0.0]), "topk", np.full(3, 0.3))[0]
    assert np.flatnonzero(third.any(1)).tolist() == [0, 2, 3]


def test_rows_without_a_chance_are_never_drawn() -> None:
    """A row of norm zero is not chosen, not by the largest draw either; where all are zero any may be."""
    scores = np.array([0.0, 1.0, 4.0, 0.0])
    picked = placed(scores, "norm", np.array([0.0, 0.33, 0.34, 1 - 2.0**-53]))[0].argmax(0)
    assert picked.tolist() == [1, 1, 2, 2]
    assert placed(np.zeros(4), "norm", np.array([0.1, 0.9]))[0].argmax(0).tolist() == [0, 3]


def test_all_rows_by_topk_are_a_dense_adam() -> None:
    """With as many rows as the weight has, steps on rows move the weight exactly as Adam on the whole of it does."""
    config = ServerOptimizerConfig(name="adam", rate=0.1)
    place = placed(np.arange(SIDE, dtype=float), "topk", np.full(SIDE, 0.5))
    assert np.array_equal(place[0].sum(0), np.ones(SIDE))
    rows = dense = np.zeros((1, SIDE, 4), np.float32)
    of_rows = of_dense = Moments.initial(dense.shape, config)
    chance = np.random.default_rng(0)
    for _ in range(3):
        delta = chance.standard_normal((1, SIDE, 4))
        dense, of_dense = step(dense, delta, of_dense, config)
        rows, of_rows = step(rows, place.transpose(0, 2, 1).astype(np.float64) @ delta, of_rows, config)
    np.testing.assert_array_equal(place @ rows, dense)


def config(**changes: object) -> RunConfig:
    """A run of four rounds that chooses rows after the second."""
    table = {"name": "r", "package": "p", "publisher_key": "A" * 43 + "=", "train_head": False}
    table |= dict.fromkeys(("seed", "steps", "batch_size", "devices_per_round"), 1)
    optimizer = {"slices": {"name": "adam", "rate": 0.1}}
    return run_config({**table, "rounds": 4, "row_refresh": 2, "server_optimizer": optimizer, **changes})


def after(rounds: int, **changes: object) -> tuple[list[Values], ServerState]:
    """Values before a run of some rounds and after each, and the state after the last."""
    chance, settings = np.random.default_rng(7), config(**changes)
    state, found = ServerState(), [start_values()]
    for number in range(rounds):
        delta = {ROWS: chance.standard_normal((1, COUNT, SIDE)).astype(np.float32)}
        update = server_update(
            found[-1],
            state,
            [Contribution(1, delta)],
            config=settings,
            specs=(SPEC,),
            round_number=number,
            committed=number,
        )
        found.append(update.values)
        state = ServerState.decode(update.state.encode())
    return found, state


def weight(values: Values) -> np.ndarray:
    """What a slice adds to its layer's weight."""
    return values[MOVED][0] + values[PLACE][0] @ values[ROWS][0]


def test_the_function_stays_when_rows_are_chosen_anew() -> None:
    """The round that chooses rows moves by its step alone: others begin at zero, the optimiser of rows afresh."""
    plain, _ = after(2, row_refresh=0)
    found, state = after(2)
    assert not np.array_equal(found[2][PLACE], found[1][PLACE])
    assert not found[2][ROWS].any()
    assert ROWS not in state.moments
    np.testing.assert_allclose(weight(found[2]), weight(plain[2]), rtol=1e-6)
    assert np.array_equal(found[1][PLACE], found[0][PLACE])


def test_rows_that_were_not_chosen_are_not_touched() -> None:
    """After any number of rounds, rows outside all choices are the bits that they were."""
    found, _ = after(4, seed=3)
    chosen = {row for values in found for row in np.flatnonzero(values[PLACE][0].any(1))}
    outside = sorted(set(range(SIDE)) - chosen)
    assert outside
    assert found[-1][MOVED][0, outside].tobytes() == found[0][MOVED][0, outside].tobytes()
    assert found[-1][MOVED].any()


def test_an_optimiser_keeps_two_numbers_for_each_of_the_rows() -> None:
    """The state is of the rows' size, 2·r·n, whatever the size of the weight."""
    _, state = after(1)
    (moments,) = state.moments.values()
    assert moments.m.size + moments.v.size == 2 * COUNT * SIDE


def test_a_choice_is_made_again_from_what_is_stored() -> None:
    """From the same scores, seed and number comes the same choice, and from another seed or number another."""
    _, state = after(1)

    def choose(seed: int, committed: int) -> bytes:
        values, _ = chosen_anew(
            start_values(),
            {},
            state.row_scores,
            (SPEC,),
            choice="uniform",
            seed=seed,
            committed=committed,
        )
        return values[PLACE].tobytes()

    assert choose(1, 2) == choose(1, 2)
    assert len({choose(seed, number) for seed in range(5) for number in range(5)}) > 10


def test_scores_are_squared_norms_of_the_rows_without_their_scale() -> None:
    """A row at scale 2 that moves by (6, 8) scores 25; the next round enters by a tenth; other rows stay unknown."""
    values = {**start_values(), PLACE: start_values()[PLACE] * np.array([2.0, 1.0], np.float32)}
    delta = np.zeros((1, COUNT, SIDE))
    delta[0, 0, :2] = 6, 8
    first = measured({}, {ROWS: delta}, values, [SPEC])
    (name,) = first
    np.testing.assert_array_equal(first[name], [25, 0, *[np.nan] * 4])
    second = measured(first, {ROWS: delta * 2}, values, [SPEC])
    np.testing.assert_allclose(second[name][:2], [0.9 * 25 + 0.1 * 100, 0])


def test_a_mean_of_rounds_is_of_functions() -> None:
    """The mean over rounds with unlike rows is the mean of what they add to the weight."""
    found, state = after(4, average_from_round=0)
    before, _ = after(4, row_refresh=0)  # the second round's step, before rows are chosen
    mean = state.average.values
    assert not mean[ROWS].any()
    np.testing.assert_allclose(
        weight(mean),
        np.mean([weight(values) for values in (found[1], before[2], *found[3:])], axis=0),
        rtol=1e-5,
        atol=1e-7,
    )


def test_a_refresh_that_never_comes_is_refused() -> None:
    """Rows that would be chosen after the run's end are a mistake, told when the configuration is read."""
    with pytest.raises(ConfigError, match="row_refresh = 4 never comes within rounds = 4"):
        config(row_refresh=4)
    with pytest.raises(ConfigError, match="row_choice"):
        config(row_choice="best")
    assert replace(config(), row_refresh=0).row_choice == "norm"
