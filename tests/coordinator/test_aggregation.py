"""Per-slice example-weighted means, and the server's step on them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coordinator.aggregation import Contribution, apply_changes, mean_change
from coordinator.config import ServerOptimizerConfig, ServerOptimizers
from tests.coordinator.conftest import World


def array(*values: float) -> np.ndarray:
    """A float32 vector."""
    return np.array(values, np.float32)


def test_by_hand() -> None:
    """Unequal devices with partly shared slices: each slice is averaged over those who trained it.

    a: (1 * 10 + 3 * 2) / 4 = 4 and (1 * 0 + 3 * 4) / 4 = 3; b: one device, 5; c: (3 * 1 + 6 * 4) / 9 = 3.
    """
    contributions = [
        Contribution(1, {"a": array(10, 0)}),
        Contribution(3, {"a": array(2, 4), "c": array(1)}),
        Contribution(6, {"b": array(5), "c": array(4)}),
    ]
    mean = mean_change(contributions)
    assert {name: values.tolist() for name, values in mean.items()} == {
        "a": [4.0, 3.0],
        "b": [5.0],
        "c": [3.0],
    }


def test_no_examples() -> None:
    """A device that applied no step weighs nothing; a slice nobody trained is not moved."""
    assert mean_change([Contribution(0, {"a": array(9)})]) == {}
    mean = mean_change([Contribution(0, {"a": array(9)}), Contribution(2, {"a": array(1)})])
    assert mean["a"].tolist() == [1.0]


def test_one_at_a_time() -> None:
    """Contributions are consumed as they come: none is asked for before the last was added and let go."""
    alive: list[int] = []

    def stream() -> object:
        for index in range(5):
            alive.append(index)
            yield Contribution(1, {"a": array(index)})

    assert mean_change(stream())["a"].tolist() == [2.0]  # type: ignore[arg-type]
    assert alive == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=20))
def test_between(parts: list[tuple[int, float]]) -> None:
    """A mean lies between the smallest and the largest change."""
    mean = mean_change(Contribution(examples, {"a": array(change)}) for examples, change in parts)
    changes = [change for _, change in parts]
    assert min(changes) - 1e-9 <= mean["a"][0] <= max(changes) + 1e-9


def test_head_has_its_own_optimizer() -> None:
    """Slices and head move by their own rules; what has no change keeps values and state."""
    optimizers = ServerOptimizers(
        slices=ServerOptimizerConfig(rate=2.0), head=ServerOptimizerConfig("momentum", rate=1.0, beta1=0.5)
    )
    values = {"s": array(1), "head": array(1), "still": array(1)}
    changes = {"s": np.array([1.0]), "head": np.array([1.0])}
    new, moments = apply_changes(values, {}, changes, head=frozenset({"head"}), optimizers=optimizers)
    assert {name: value.tolist() for name, value in new.items()} == {
        "s": [3.0],
        "head": [1.5],
        "still": [1.0],
    }
    assert sorted(moments) == ["head", "s"]


def play_in_order(world: World, backwards: bool) -> bytes:
    """A run of two rounds whose results arrive in the one or the other order; its final values."""
    names = ["a", "b", "c"]
    devices = world.fleet(*names)
    world.create_run(devices_per_round=3, min_devices=3, min_results=3)
    for _ in range(2):
        world.play()
        tasks = [(device, device.task()) for device in devices]
        for device, task in tasks[::-1] if backwards else tasks:
            assert task is not None
            device.deliver(device.result(task))
        world.play()
    assert world.run()["state"] == "finished"
    return world.values()


def test_order_of_arrival(tmp_path_factory: object) -> None:
    """The same seeds give the same final bytes, whatever the order in which results arrive."""
    make = tmp_path_factory.mktemp  # type: ignore[attr-defined]
    forwards = play_in_order(World(make("forwards")), backwards=False)
    assert forwards == play_in_order(World(make("backwards")), backwards=True)
