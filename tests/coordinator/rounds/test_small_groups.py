"""Figures of few devices stay out of reports."""

from __future__ import annotations

from typing import Any

import pytest

from tests.coordinator.conftest import World


def figures(world: World, **changed: Any) -> tuple[object, ...]:
    """What a round of two devices shows of them."""
    world.work(world.fleet("a", "b"))
    world.create_run(rounds=1, devices_per_round=2, min_devices=2, min_results=2, **changed)
    world.work([world.devices[name] for name in ("a", "b")])
    (entry,) = world.run()["rounds"]
    assert entry["state"] == "committed"
    assert entry["devices"] == ["a", "b"] or entry["devices"] == ["b", "a"]
    return (entry["train_loss"], entry["examples"], entry["measured_peak_bytes"], len(entry["scores"]))


@pytest.mark.parametrize("least", [None, 1])
def test_figures_are_shown_as_they_always_were(world: World, least: int | None) -> None:
    """Without a least group each figure is there."""
    loss, examples, peak, scores = figures(world, **({} if least is None else {"least_group": least}))
    assert (loss, examples, peak, scores) == (0.5, 9, 90, 2)


def test_figures_of_few_devices_are_not_shown(world: World) -> None:
    """A round of two devices shows no loss, examples, memory nor single scores where three are the least."""
    assert figures(world, least_group=3) == (None, 0, None, 0)


def test_single_devices_are_not_shown_where_groups_of_two_are(world: World) -> None:
    """A score is of one device, so it is shown in no run with a least group; the round's loss is of two."""
    assert figures(world, least_group=2) == (0.5, 9, 90, 0)
