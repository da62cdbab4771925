"""Runs in lines, curves and comparisons."""

from __future__ import annotations

from coordinator.config import run_config
from coordinator.dashboard import run_pages
from coordinator.rounds.runs import find_run
from coordinator.storage import evaluation_rows
from tests.coordinator.conftest import World


def test_curves_come_as_rounds_do(world: World) -> None:
    """There is no curve before a round, one of losses after it, and one of accuracy once values were evaluated."""
    devices = world.fleet("a", "b")
    run_id = world.create_run()

    def titles() -> list[tuple[str, list[str]]]:
        with world.stores.storage.reading() as connection:
            run = find_run(world.stores, connection, run_id)
            return [(curve["title"], curve["lines"]) for curve in run_pages.curves(connection, run)]

    assert titles() == []
    world.work(devices)
    assert titles() == [("Loss", ["loss that devices reported"])]
    with world.stores.storage.transaction() as connection:
        evaluation_rows.add(connection, run_id, 0, "0" * 64)
        evaluation_rows.store_done(
            connection, run_id, 0, rows=5, accuracy=0.75, mean_loss=0.5, seconds=1, tokens=0, groups={}
        )
    assert titles() == [
        ("Accuracy", ["accuracy"]),
        ("Loss", ["loss of evaluations", "loss that devices reported"]),
    ]
    with world.stores.storage.reading() as connection:
        (head,) = run_pages.run_list(world.stores, connection)
    assert head.score == "75.0 %, loss 0.5000"
    assert (head.done, head.wanted, head.state) == (1, 2, "running")


def test_settings_are_those_that_were_set(world: World) -> None:
    """Keys at their defaults are left out; each other has its value and its meaning."""
    config = run_config(world.config(local_optimizer={"slice_rate": 0.25}))
    found = {path: (value, meaning) for path, value, meaning in run_pages.settings(config)}
    assert found["local_optimizer.slice_rate"][0] == "0.25"
    assert "learning rate" in found["local_optimizer.slice_rate"][1].lower() or found["steps"][1]
    assert "max_abandoned" in found
    assert "norm_limit" not in found
