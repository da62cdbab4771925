from __future__ import annotations

import pytest

from coordinator.rounds.robustness import GroupScore, Robustness, robustness_of


def of(**scores: tuple[float, float]) -> Robustness:
    """Groups by name; those whose name begins with ``seen`` took part."""
    return robustness_of(
        [GroupScore(name, name.startswith("seen"), 4, *pair) for name, pair in scores.items()]
    )


def test_a_run_that_changed_nothing_has_none() -> None:
    """Robustness of the values that a run started from is 0, whatever their scores are."""
    found = of(seen=(0.5, 0.5), unseen=(0.2, 0.2))
    assert (found.seen, found.unseen, found.crrm_standin) == (0, 0, 0)


def test_it_rises_with_one_group_and_falls_with_another() -> None:
    """One group's gain raises it, an unseen one's loss lowers it, and half of the weight is that of unseen groups."""
    assert of(seen=(0.5, 0.6), seen2=(0.5, 0.5), unseen=(0.4, 0.4)).crrm_standin == pytest.approx(0.05)
    assert of(seen=(0.5, 0.5), unseen=(0.4, 0.3)).crrm_standin == pytest.approx(-0.125)


def test_small_changes_of_scores_move_it_little() -> None:
    """It is continuous: a group whose score changes by a millionth of it moves the metric by half of that."""
    before = of(seen=(0.5, 0.5), unseen=(0.4, 0.4)).crrm_standin
    after = of(seen=(0.5, 0.5 + 5e-7), unseen=(0.4, 0.4)).crrm_standin
    assert before is not None
    assert after == pytest.approx(before + 5e-7)


def test_without_groups_on_one_side_there_is_no_metric() -> None:
    """Where everybody took part, the mean over them stands alone; a score of nothing is no division by zero."""
    found = of(seen=(0.0, 0.1))
    assert (found.unseen, found.crrm_standin) == (None, None)
    assert found.seen == pytest.approx(100)
