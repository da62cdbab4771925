"""Runs that grow: which slices are trained when, and that joining changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.aggregation.growth import check_growth, grown, grown_slices
from coordinator.aggregation.mean import Contribution
from coordinator.aggregation.server_optimizers import Moments
from coordinator.aggregation.server_state import ServerState
from coordinator.aggregation.server_step import server_update
from coordinator.config import RunConfig, run_config
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import SliceSpec, TensorSpec
from edge_runtime.package.slices import Values, decode_values, shapes
from tests.coordinator.conftest import SPECS, World

IN, OUT, RANK = 5, 4, 2


def lora(block: int, layer: str) -> SliceSpec:
    """A LoRA slice of a block's layer."""
    tensors = (TensorSpec("A", (1, RANK, IN), "a"), TensorSpec("B", (1, OUT, RANK), "b"))
    return SliceSpec(f"b{block}.{layer}", "lora", (block,), f"layer.{block}.{layer}", tensors)


SLICES = tuple(lora(block, layer) for block in (1, 2, 3, 4, 5) for layer in ("query", "value"))


def config(**changes: object) -> RunConfig:
    """A run of six rounds that grows after the second and the fourth."""
    table = {"name": "r", "package": "p", "publisher_key": "A" * 43 + "=", "train_head": False}
    table |= dict.fromkeys(("seed", "steps", "batch_size", "devices_per_round"), 1)
    optimizer = {"slices": {"name": "adam", "rate": 0.1}}
    return run_config({**table, "rounds": 6, "grow_at": [2, 4], "server_optimizer": optimizer, **changes})


def blocks_at(committed: int, grow_at: tuple[int, ...] = (2, 4)) -> list[int]:
    names = grown_slices(grow_at, SLICES, committed)
    return sorted({spec.segment for spec in SLICES if spec.name in names})


def test_blocks_join_from_the_last_backwards() -> None:
    """Five blocks in three stages: two, four, all; without growth all at once. A block joins whole."""
    assert [blocks_at(number) for number in range(6)] == [
        *([[4, 5]] * 2),
        *([[2, 3, 4, 5]] * 2),
        *([[1, 2, 3, 4, 5]] * 2),
    ]
    assert blocks_at(0, ()) == [1, 2, 3, 4, 5]
    assert grown_slices((2,), SLICES[:4], 0) == ("b2.query", "b2.value")


def trained(committed: int) -> tuple[Values, ServerState]:
    """Values and state after so many rounds in which all slices of the stage moved."""
    chance, settings = np.random.default_rng(3), config()
    values = {
        name: (chance.standard_normal(shape) * name.endswith("A")).astype(np.float32)
        for name, shape in shapes(SLICES).items()
    }
    state = ServerState()
    for number in range(committed):
        names = grown_slices(settings.grow_at, SLICES, number)
        moved = shapes([spec for spec in SLICES if spec.name in names])
        delta = {name: chance.standard_normal(shape).astype(np.float32) for name, shape in moved.items()}
        update = server_update(
            values,
            state,
            [Contribution(1, delta)],
            config=settings,
            specs=SLICES,
            round_number=number,
            committed=number,
        )
        values, state = update.values, ServerState.decode(update.state.encode())
    return values, state


def function(values: Values) -> list[np.ndarray]:
    """What each slice adds to its layer's weight."""
    return [values[f"{spec.name}/B"][0] @ values[f"{spec.name}/A"][0] for spec in SLICES]


def test_joining_changes_nothing() -> None:
    """At the moment of growth each slice adds, bit for bit, what it did; the new ones have their neighbours' A."""
    values, state = trained(1)
    settings = config(grow_at=[1, 4])
    after, moments = grown(values, state.moments, SLICES, settings, 1)
    for before, now in zip(function(values), function(after), strict=True):
        assert before.tobytes() == now.tobytes()
    for new, source in (("b3.query", "b4.query"), ("b2.value", "b4.value")):
        assert np.array_equal(after[f"{new}/A"], values[f"{source}/A"])
        assert not after[f"{new}/B"].any()
        assert np.array_equal(moments[f"{new}/B"].v, state.moments[f"{source}/B"].v)
        assert not moments[f"{new}/B"].m.any()
    for name in values:
        if name.startswith(("b1", "b4", "b5")):
            assert np.array_equal(after[name], values[name]), name


def test_a_slice_that_is_not_at_zero_stays_as_it_is() -> None:
    """A package that goes on from an adapter has a B of its own: there A is not replaced."""
    values, state = trained(1)
    values["b3.query/B"] = np.ones_like(values["b3.query/B"])
    after, _ = grown(values, state.moments, SLICES, config(grow_at=[1, 4]), 1)
    assert np.array_equal(after["b3.query/A"], values["b3.query/A"])
    assert not np.array_equal(after["b3.value/A"], values["b3.value/A"])


def test_other_rounds_start_nothing() -> None:
    """Between the rounds of growth values and state are handed on as they are."""
    values, state = trained(1)
    after, moments = grown(values, state.moments, SLICES, config(), 3)
    assert after == values
    assert moments == state.moments
    assert grown(values, {}, SLICES, config(), 2)[1] == {}
    assert isinstance(next(iter(state.moments.values())), Moments)


def test_the_server_grows_after_the_round_that_says_so() -> None:
    """Two rounds move the last two blocks alone; with the second commit four are ready, and the rest still wait."""
    first, _ = trained(0)
    values, _ = trained(2)
    changed = {name.partition(".")[0] for name in values if not np.array_equal(values[name], first[name])}
    assert changed == {"b2", "b3", "b4", "b5"}
    assert all(
        not values[name].any() for name in values if name.startswith(("b2", "b3")) and name.endswith("B")
    )


def test_tasks_grow_with_the_run_and_a_killed_coordinator_goes_on(tmp_path: Path) -> None:
    """Devices are given the last block's slices, and from the second commit all, whether the coordinator was killed."""
    world = World(tmp_path)
    devices = world.fleet("a", "b")
    world.create_run(rounds=4, grow_at=[2], split="whole", train_head=True)
    start = decode_values(world.values(), SPECS)
    given = []
    for number in range(4):
        world.play()
        if number in (1, 2):
            world.start()  # as after kill -9
            world.play()
        given.append({device.task().slices for device in devices})
        world.work(devices)
        if number == 1:
            now = decode_values(world.values(), SPECS)
            assert np.array_equal(now["s0/core"], start["s0/core"])
            assert not np.array_equal(now["s2/core"], start["s2/core"])
    assert given == [{("s2",)}] * 2 + [{("s0", "s1", "s2")}] * 2
    assert world.run()["state"] == "finished"
    world.stores.storage.close()


@pytest.mark.parametrize(
    ("changes", "message", "way_out"),
    [
        ({"grow_at": [2, 6]}, "past the last of rounds = 6", {"grow_at": [2, 5]}),
        ({"grow_at": [4, 2]}, "once and in order", {"grow_at": [2, 4]}),
        ({"grow_at": [2, 2]}, "once and in order", {"grow_at": [2]}),
        ({"grow_at": [0]}, "grow_at", {"grow_at": [1]}),
        ({"slices": "none", "train_head": True}, "leave one out", {"slices": "all"}),
        ({"train_head": True, "head_warm_up_rounds": 2}, "take 3 or more", {"grow_at": [3]}),
        ({"exits": [2, 4], "train_head": True}, "leave one out", {"exits": []}),
        ({"gate_variance": 1.0, "min_results": 1}, "gate", {"gate_variance": None}),
    ],
)
def test_growth_that_cannot_be_is_refused(changes: dict, message: str, way_out: dict) -> None:
    """A round past the end, out of order or before slices are trained is one line, and its way out is taken."""
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert config(**{**changes, **way_out}).rounds == 6


def test_more_stages_than_blocks_are_refused(tmp_path: Path) -> None:
    """A run of two blocks can grow once; a second time is refused before anything is written."""
    world = World(tmp_path)
    answer = world.admin("POST", "/v1/admin/runs", world.config(rounds=4, grow_at=[1, 2]))
    assert answer.status_code == 422
    assert "slices of 2: name at most 1 rounds" in answer.text
    assert world.admin("GET", "/v1/admin/runs").json() == []
    check_growth(config(grow_at=[1, 2, 3, 4]), SLICES)
    world.stores.storage.close()
