"""A head in closed form: what the formulas say, from sums alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.closed_form import GRID, ClosedForm, add_up, solve, visit_update
from coordinator.aggregation.server_state import ServerState
from edge_runtime.errors import SliceError
from edge_runtime.training.feature_sums import FeatureSums

CLASSES = 3


def rows_of(rows: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels that have something to do with each other."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((rows, width)) * np.arange(1, width + 1) + 2
    labels = (
        features[:, :CLASSES] / np.arange(1, CLASSES + 1) + random.standard_normal((rows, CLASSES))
    ).argmax(1)
    return features, labels


def sums_of(features: np.ndarray, labels: np.ndarray, classes: int = CLASSES) -> FeatureSums:
    one_hot = np.eye(classes)[labels]
    beside = np.concatenate([np.ones((len(features), 1)), one_hot], axis=1)
    return FeatureSums(len(features), features.T @ features, features.T @ beside, one_hot.sum(axis=0))


def logits_of(solved: ClosedForm, features: np.ndarray) -> np.ndarray:
    return features @ solved.weight.T.astype(np.float64) + solved.bias


def test_it_is_the_ridge_regression_of_the_standardised_rows() -> None:
    """Scores equal a least-squares fit, by an augmented system, of rows standardised one by one."""
    features, labels = rows_of(80)
    solved = solve(sums_of(features, labels), ridge=0.05)
    standard = (features - features.mean(0)) / features.std(0)
    one_hot = np.eye(CLASSES)[labels]
    damped = np.concatenate([standard, np.sqrt(0.05 * len(labels)) * np.eye(features.shape[1])])
    wanted = np.linalg.lstsq(damped, np.concatenate([one_hot, np.zeros((6, CLASSES))]), rcond=None)[0]
    np.testing.assert_allclose(logits_of(solved, features), solved.scale * standard @ wanted, atol=1e-4)


def test_the_error_is_near_that_of_leaving_each_row_out() -> None:
    """Generalised cross-validation is within a tenth of the mean error of rows that each fit did not see."""
    features, labels = rows_of(60)
    solved = solve(sums_of(features, labels), ridge=0.1)
    standard = (features - features.mean(0)) / features.std(0)
    one_hot = np.eye(CLASSES)[labels] - np.eye(CLASSES)[labels].mean(0)
    errors = []
    for row in range(60):
        rest = np.arange(60) != row
        gram = standard[rest].T @ standard[rest] + 0.1 * 60 * np.eye(6)
        weights = np.linalg.solve(gram, standard[rest].T @ one_hot[rest])
        errors.append(((one_hot[row] - standard[row] @ weights) ** 2).sum())
    assert solved.error == pytest.approx(np.mean(errors), rel=0.1)


def test_the_chosen_ridge_has_the_least_error_on_the_grid() -> None:
    """No ridge of the grid has a smaller error than the one that was chosen."""
    sums = sums_of(*rows_of(200, width=30))
    chosen = solve(sums)
    assert chosen.error <= min(solve(sums, ridge).error for ridge in GRID) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), min_size=1, max_size=5, unique=True), seed=st.integers(0, 100))
def test_a_fleet_solves_what_one_device_with_all_rows_would(cuts: list[int], seed: int) -> None:
    """However rows are shared out, labels of whole classes on one device included, the head is the same."""
    features, labels = rows_of(60, seed=seed)
    order = np.argsort(labels, kind="stable") if seed % 2 else np.arange(60)
    features, labels = features[order], labels[order]
    parts = np.split(np.arange(60), sorted(cuts))
    total = add_up(None, (sums_of(features[part], labels[part]) for part in parts))
    assert total is not None
    fleet, alone = solve(total, 0.1), solve(sums_of(features, labels), 0.1)
    np.testing.assert_allclose(logits_of(fleet, features), logits_of(alone, features), atol=1e-3)


def test_constant_and_collinear_features_are_solved_and_told() -> None:
    """A feature that is the same in all rows gets no weight and is counted; one that is there twice changes little."""
    features, labels = rows_of(80)
    plain = solve(sums_of(features, labels), 0.1)
    more = np.concatenate([features, np.full((80, 1), 3.0), -2 * features[:, :1] + 1], axis=1)
    solved = solve(sums_of(more, labels), 0.1)
    assert (plain.constant, plain.repeated) == (0, 0)
    assert (solved.constant, solved.repeated) == (1, 1)
    assert not solved.weight[:, 6].any()
    assert np.isfinite(solved.weight).all()
    agree = logits_of(solved, more).argmax(1) == logits_of(plain, features).argmax(1)
    assert agree.mean() > 0.9


def test_features_that_are_sums_of_others_are_solved() -> None:
    """A feature that is a combination of two others, so that no inverse exists without a ridge, does no harm."""
    features, labels = rows_of(80)
    plain = solve(sums_of(features, labels), 0.1)
    more = np.concatenate([features, features[:, :1] + features[:, 1:2]], axis=1)
    solved = solve(sums_of(more, labels), 0.1)
    agree = logits_of(solved, more).argmax(1) == logits_of(plain, features).argmax(1)
    assert agree.mean() > 0.9
    assert np.isfinite(solved.weight).all()


def test_only_features_that_are_all_the_same_are_left() -> None:
    """Rows that all have one vector give a head of zeros and finite logits: there is nothing to tell them apart by."""
    features = np.tile(np.arange(1.0, 7.0), (10, 1))
    solved = solve(sums_of(features, np.arange(10) % CLASSES))
    assert solved.constant == 6
    assert not solved.weight.any()
    assert np.isfinite(logits_of(solved, features)).all()


def test_no_rows_at_all_give_a_head_of_zeros() -> None:
    """Where all rows were taken off again, nothing is predicted, and all classes are told to be without rows."""
    features, labels = rows_of(10)
    sums = sums_of(features, labels)
    solved = solve(sums.minus(sums))
    assert (solved.rows, solved.absent) == (0, (0, 1, 2))
    assert not solved.weight.any()


@pytest.mark.parametrize("gram", [np.full((6, 6), np.nan), -80 * 0.1 * np.eye(6)])
def test_sums_that_give_no_finite_head_are_an_error_of_one_kind(gram: np.ndarray) -> None:
    """Sums that no rows could have, and that passed what is checked of each device, are refused as a whole."""
    features, labels = rows_of(80)
    bad = replace(sums_of(features, labels), gram=gram)
    with np.errstate(all="ignore"), pytest.raises(SliceError, match="the sums give"):
        visit_update({}, ServerState(), [bad], head="head", ridge=0.1)


def test_a_class_that_no_device_has_is_told_and_never_favoured() -> None:
    """The logits of a class without rows are zero, and its index is told."""
    features, labels = rows_of(80)
    solved = solve(sums_of(features, labels, classes=4), 0.1)
    assert solved.absent == (3,)
    assert not logits_of(solved, features)[:, 3].any()
    assert (logits_of(solved, features).argmax(1) != 3).mean() > 0.95


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_give_a_finite_head(rows: int) -> None:
    """One row, two rows, fewer rows than features: the head is finite and predicts."""
    features, labels = rows_of(rows, width=40)
    solved = solve(sums_of(features, labels))
    assert np.isfinite(solved.weight).all()
    assert np.isfinite(solved.bias).all()
    assert np.isfinite(solved.scale)


def test_logits_are_calibrated_without_a_dev_set() -> None:
    """On rows of its own kind, the loss is within a tenth of what the best single factor would give."""
    features, labels = rows_of(4000)
    solved = solve(sums_of(features[:2000], labels[:2000]))
    logits, own = logits_of(solved, features[2000:]), labels[2000:]

    def loss(factor: float) -> float:
        scaled = logits * factor
        return float(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(2000), own]))

    best = min(loss(factor) for factor in np.geomspace(0.1, 10, 200))
    assert loss(1.0) < 1.1 * best
    assert loss(1.0) < np.log(CLASSES)


def test_a_visit_goes_on_from_what_its_state_holds() -> None:
    """Round after round, through the stored state, the head is that of all sums so far; other values stay."""
    features, labels = rows_of(90)
    values = {
        "head/weight": np.zeros((CLASSES, 6), np.float32),
        "head/bias": np.zeros(CLASSES, np.float32),
        "slice/core": np.ones((1, 2, 2), np.float32),
    }
    state = ServerState()
    for start in (0, 30, 60):
        part = slice(start, start + 30)
        updated = visit_update(
            values, state, [sums_of(features[part], labels[part])], head="head", ridge=None
        )
        assert updated is not None
        update, solved = updated
        state = ServerState.decode(update.state.encode())
    assert solved.rows == 90
    whole = solve(sums_of(features, labels), solved.ridge)
    np.testing.assert_allclose(update.values["head/weight"], whole.weight, atol=1e-4)
    np.testing.assert_array_equal(update.values["slice/core"], values["slice/core"])
    assert state.ridge == solved.ridge


def test_a_visit_without_sums_solves_nothing() -> None:
    """Without any sums there is no head to solve."""
    assert visit_update({}, ServerState(), [], head="head", ridge=None) is None
