"""Per-slice example-weighted means, and the server's step on them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from coordinator.aggregation.mean import Contribution, apply_deltas, mean_delta
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import server_update
from coordinator.config import ServerOptimizerConfig, ServerOptimizers, run_config
from tests.coordinator.conftest import RUN, World


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
    mean = mean_delta(contributions)
    assert {name: values.tolist() for name, values in mean.items()} == {
        "a": [4.0, 3.0],
        "b": [5.0],
        "c": [3.0],
    }


def test_no_examples() -> None:
    """A device that applied no step weighs nothing; a slice nobody trained is not moved."""
    assert mean_delta([Contribution(0, {"a": array(9)})]) == {}
    mean = mean_delta([Contribution(0, {"a": array(9)}), Contribution(2, {"a": array(1)})])
    assert mean["a"].tolist() == [1.0]


def fixed_point(optima: list[float], steps: list[int], *, normalise: bool) -> float:
    """Where rounds of FedAvg come to rest on f_i(x) = 1/2 (x - c_i)^2 with equally many examples.

    A device takes its steps of 0.02 at the values the round started from: its delta is s_i · 0.02 · (c_i - x).
    """
    x = 0.0
    for _ in range(500):
        contributions = [
            Contribution(10, {"x": array(s * 0.02 * (c - x))}, steps=s if normalise else 1)
            for c, s in zip(optima, steps, strict=True)
        ]
        x += float(mean_delta(contributions)["x"][0])
    return x


def test_unequal_steps_in_closed_form() -> None:
    """Plain averaging rests at the step-weighted mean of the optima, which is wrong; normalised, at their mean.

    Optima 0, 3, 12 and 1, 2, 9 local steps: (0·1 + 3·2 + 12·9) / 12 = 9.5, and (0 + 3 + 12) / 3 = 5.
    """
    optima, steps = [0.0, 3.0, 12.0], [1, 2, 9]
    assert abs(fixed_point(optima, steps, normalise=False) - 9.5) < 1e-5
    assert abs(fixed_point(optima, steps, normalise=True) - 5.0) < 1e-5


def test_normalised_by_hand() -> None:
    """Changes per step are averaged, then multiplied by the mean steps of those who trained the tensor.

    a: (1·4/2 + 3·6/6) / 4 = 1.25, mean steps (1·2 + 3·6) / 4 = 5, so 6.25; b: one device, its own delta.
    """
    contributions = [
        Contribution(1, {"a": array(4)}, steps=2),
        Contribution(3, {"a": array(6), "b": array(7)}, steps=6),
        Contribution(3, {"a": array(9)}, steps=0),
    ]
    mean = mean_delta(contributions)
    assert {name: values.tolist() for name, values in mean.items()} == {"a": [6.25], "b": [7.0]}


def test_equal_steps_change_nothing_much() -> None:
    """Where all devices take equally many steps, the normalised mean is the plain one."""
    deltas = [(1, array(0.3)), (5, array(-1.7)), (2, array(9.1))]
    plain = mean_delta(Contribution(n, {"a": delta}) for n, delta in deltas)
    normalised = mean_delta(Contribution(n, {"a": delta}, steps=7) for n, delta in deltas)
    np.testing.assert_allclose(normalised["a"], plain["a"], rtol=1e-14)


def test_a_run_normalises_by_applied_steps(world: World) -> None:
    """normalise_steps divides by the steps a result says it applied."""
    world.fleet("a", "b")
    world.create_run(split="whole", normalise_steps=True, rounds=1)
    world.play()
    results = []
    for applied, device in enumerate(world.devices.values(), start=2):
        task = device.task()
        assert task is not None
        results.append((applied, device.result(task, steps_applied=applied)))
        device.deliver(results[-1][1])
    world.play()
    total = sum(result.examples for _, result in results)
    steps = sum(result.examples * applied for applied, result in results) / total
    wanted = sum(
        load(result.change)["s0/core"].astype(np.float64) * result.examples / applied / total
        for applied, result in results
    )
    np.testing.assert_allclose(load(world.values())["s0/core"], wanted * steps, rtol=1e-6)


def test_one_at_a_time() -> None:
    """Contributions are consumed as they come: none is asked for before the last was added and let go."""
    alive: list[int] = []

    def stream() -> object:
        for index in range(5):
            alive.append(index)
            yield Contribution(1, {"a": array(index)})

    assert mean_delta(stream())["a"].tolist() == [2.0]  # type: ignore[arg-type]
    assert alive == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=20))
def test_between(parts: list[tuple[int, float]]) -> None:
    """A mean lies between the smallest and the largest delta."""
    mean = mean_delta(Contribution(examples, {"a": array(delta)}) for examples, delta in parts)
    deltas = [delta for _, delta in parts]
    assert min(deltas) - 1e-9 <= mean["a"][0] <= max(deltas) + 1e-9


def test_head_has_its_own_optimizer() -> None:
    """Slices and head move by their own rules; what has no delta keeps values and state."""
    optimizers = ServerOptimizers(
        slices=ServerOptimizerConfig(rate=2.0), head=ServerOptimizerConfig("momentum", rate=1.0, beta1=0.5)
    )
    values = {"s": array(1), "head": array(1), "still": array(1)}
    deltas = {"s": np.array([1.0]), "head": np.array([1.0])}
    new, moments = apply_deltas(values, {}, deltas, head=frozenset({"head"}), optimizers=optimizers)
    assert {name: value.tolist() for name, value in new.items()} == {
        "s": [3.0],
        "head": [1.5],
        "still": [1.0],
    }
    assert sorted(moments) == ["head", "s"]


def test_rates_fall_by_the_share_of_rounds_left() -> None:
    """With rate_decay = "linear" round r of R moves by (R - r)/R of what it moves by without."""
    moved = {}
    for decay in ("none", "linear"):
        values, state, trace = {"s": array(0)}, ServerState(), []
        for number in range(4):
            contributions = [Contribution(1, {"s": array(1)})]
            config = run_config(
                {**RUN, "package": "p", "publisher_key": "A" * 43 + "=", "rounds": 4, "rate_decay": decay}
            )
            step = server_update(
                values, state, contributions, config=config, specs=[], round_number=number, committed=number
            )
            trace.append(float(step.values["s"][0] - values["s"][0]))
            values, state = step.values, step.state
        moved[decay] = trace
    assert moved == {"none": [1.0, 1.0, 1.0, 1.0], "linear": [1.0, 0.75, 0.5, 0.25]}


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
