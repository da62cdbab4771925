"""Rounds in which a device sends what nobody should: the others' work counts, and the device is named."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.package.slices import decode_values
from tests.coordinator.conftest import SPECS, FakeDevice, World

FIVE = ("a", "b", "c", "d", "e")


def play_round(world: World, scales: dict[str, float]) -> None:
    """One round in which each device scales its honest change."""
    world.play()
    for name, device in world.devices.items():
        task = device.task()
        if task is not None:
            assert device.deliver(device.result(task, scale=scales.get(name, 1.0))).status_code == 200
    world.play()


def start(world: World, count: int = 5, **changed: object) -> list[FakeDevice]:
    """A run over so many devices, all of which every round asks."""
    devices = world.fleet(*FIVE[:count])
    settings = {"devices_per_round": count, "min_devices": count, "split": "whole", "rounds": 9, **changed}
    world.create_run(**settings)
    return devices


def events(world: World, code: str) -> list[dict[str, object]]:
    """Events of a kind."""
    return [e for e in world.admin("GET", "/v1/admin/runs/latest/events").json() if e["code"] == code]


@pytest.mark.parametrize("scale", [1e5, 1e8, 1e30, 3e37, -1e30])
def test_an_absurd_change_is_left_out(world: World, scale: float) -> None:
    """One of five that sends far too much changes nothing: values end as if it had been silent, and it is named."""
    start(world, min_results=2)
    play_round(world, {"c": scale})
    (row,) = world.run()["rounds"][:1]
    assert (row["state"], row["left_out"]) == ("committed", ["c"])
    assert row["scores"]["a"] < 1000 < row["scores"].get("c", 1e99)
    (event,) = events(world, "result_left_out")
    assert (event["device"], "norm_limit" in event["message"] or "beyond" in event["message"]) == ("c", True)
    values = decode_values(world.values(), SPECS)
    assert all(np.abs(array).max() < 10 for array in values.values())


@pytest.mark.parametrize("count", [1, 2])
def test_few_devices_are_compared_with_earlier_rounds(world: World, count: int) -> None:
    """Where a round has too few to compare, what the round before had is the measure; nobody is accused of it."""
    start(world, count, min_results=1, max_abandoned=50, max_left_out=1, rounds=4)
    if count == 2:
        play_round(world, {})
    else:
        world.stores.storage._connection.execute(
            'UPDATE runs SET delta_sizes = \'{"head": 0.3, "s0": 0.3, "s1": 0.3, "s2": 0.3}\''
        )
    before = world.values()
    play_round(world, {"a": 1e25})
    assert events(world, "result_left_out")[-1]["device"] == "a"
    assert world.run()["set_aside"] == []
    if count == 1:
        assert (world.run()["rounds"][-1]["state"], world.values()) == ("abandoned", before)
        assert "a:" in world.run()["rounds"][-1]["reason"]
    else:
        assert world.run()["rounds"][-1]["state"] == "committed"


def test_a_device_that_goes_on_is_asked_no_more(world: World) -> None:
    """The third result that is left out sets a device aside, with the reason; the run goes on to its end without it."""
    start(world, rounds=6, min_results=2)
    for _ in range(5):
        play_round(world, {"b": 1e9})
    aside = world.run()["set_aside"]
    assert [row["device"] for row in aside] == ["b"]
    assert "3 of its results were left out" in aside[0]["reason"]
    assert len(events(world, "result_left_out")) == 3
    assert world.devices["b"].check_in().code == "set_aside"  # type: ignore[union-attr]
    world.clock.now_s += 1
    assert world.admin("POST", "/v1/admin/devices/b/resume").status_code == 200
    world.clock.now_s += 1
    world.devices["b"].check_in()
    play_round(world, {"b": 1e9})
    assert world.run()["set_aside"] == []


def test_a_limit_may_be_moved(world: World) -> None:
    """A narrow norm_limit leaves out what the default lets in; the score is told in either case."""
    start(world, norm_limit=30.0, min_results=2, rounds=1)
    play_round(world, {"c": 300.0})
    narrow = world.run()["rounds"][0]
    world.create_run(devices_per_round=5, min_devices=5, split="whole", rounds=1)
    play_round(world, {"c": 300.0})
    wide = world.run()["rounds"][0]
    assert (narrow["left_out"], wide["left_out"]) == (["c"], [])
    assert min(narrow["scores"]["c"], wide["scores"]["c"]) > 30


def test_a_round_without_enough_is_abandoned_by_name(world: World) -> None:
    """Where too few results are left, the round is abandoned and says whose were left out."""
    start(world, min_results=5)
    before = world.values()
    play_round(world, {"d": 1e12})
    row = world.run()["rounds"][0]
    assert (row["state"], world.values()) == ("abandoned", before)
    assert "4 results of at least 5" in row["reason"]
    assert "d: its change" in row["reason"]


@pytest.mark.parametrize("robust_mean", ["clipped", "trimmed", "median"])
def test_robust_means_bound_what_the_limit_lets_in(world: World, robust_mean: str) -> None:
    """With a robust mean a change that the limit lets in moves the values no further than an honest one could."""
    start(world, norm_limit=1e9, robust_mean=robust_mean, min_results=5)
    play_round(world, {"c": 1e6})
    values = decode_values(world.values(), SPECS)
    assert world.run()["rounds"][0]["state"] == "committed"
    assert all(np.abs(array).max() < 10 for array in values.values())


def test_slices_that_differ_in_size_are_not_compared(world: World) -> None:
    """With a cyclic deal each device trains other slices: changes that differ a hundredfold are honest, 1e8 is not."""
    start(world, 3, split="cyclic", rounds=3, min_results=2)
    play_round(world, {"a": 100.0, "b": 0.3})
    assert world.run()["rounds"][0]["left_out"] == []
    play_round(world, {"c": 1e8})
    assert world.run()["rounds"][1]["left_out"] == ["c"]
