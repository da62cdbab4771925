"""Runs with differential privacy: what is noised, by whom, what is told of it, and what is refused before the run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.aggregation.accountant import epsilon_of
from coordinator.config import PrivacyConfig, run_config
from edge_runtime.errors import ConfigError
from edge_runtime.package.slices import decode_values
from edge_runtime.protocol.messages import NotEligible, Task
from edge_runtime.training.protected import clipped, flat, layout_of, protect
from tests.coordinator.conftest import FakeDevice, World
from tests.coordinator.rounds.test_state_machine import holders
from tests.coordinator.rounds.test_visits import TRAINED, VISIT, sums

#: So little noise that values can be told from those without; and ε is then large, as it should be.
FAINT: dict[str, Any] = {"noise_multiplier": 1e-4, "clip_norm": 0.5}
WHOLE: dict[str, Any] = {"devices_per_round": 3, "min_devices": 3, "min_results": 2, "split": "whole"}
KEY = bytes(range(32))


def private_fleet(world: World, *names: str) -> list[FakeDevice]:
    """Devices that know how to protect what they contribute."""
    devices = world.fleet(*names)
    for device in devices:
        device.protects = True
        device.check_in()
    return devices


def protected(device: FakeDevice, task: Task) -> Any:
    """What a device hands in that protects its contribution as the task says."""
    plain = device.result(task)
    data = protect(task, device.world.stores.manifest(task.package), plain.change, plain.examples, KEY)
    return device.result(task, change=data, change_sha256=_sha256(data), examples=1, mean_loss=None)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_round_moves_by_the_clipped_sum_over_all_places(world: World) -> None:
    """With noise by the server each change counts the same, clipped; the sum is divided by the places of a round."""
    private_fleet(world, "a", "b", "c")
    world.create_run(**{**WHOLE, "devices_per_round": 4}, rounds=1, privacy=FAINT)
    world.play()
    before = decode_values(world.values(), world.stores.manifest(_task(world).package).slices)
    total: dict[str, Any] = {}
    for device, task in holders(world):
        assert task.protection is not None
        assert not task.protection.hides
        layout = layout_of(task, world.stores.manifest(task.package))
        change = decode_values(device.result(task).change, world.specs)
        vector = clipped(flat(layout, change), 0.5)
        assert np.linalg.norm(vector) == pytest.approx(0.5)
        start = 0
        for name, shape in layout.tensors.items():
            size = int(np.prod(shape))
            total[name] = total.get(name, 0) + vector[start : start + size].reshape(shape)
            start += size
        assert world.devices[device.name].deliver(device.result(task)).json() == {"status": "counted"}
    world.play(2)
    after = decode_values(world.values(), world.specs)
    for name, moved in total.items():
        noise = after[name] - before[name] - moved / 4
        assert np.abs(noise).max() < 1e-3, name
        assert np.abs(noise).max() > 0, name


def _task(world: World) -> Task:
    return holders(world)[0][1]


def test_epsilon_is_told_in_json_and_report_and_counts_the_busiest_device(world: World) -> None:
    """After each round ε follows from how often the busiest device took part; loss and examples are not told."""
    private_fleet(world, "a", "b", "c")
    world.create_run(**WHOLE, rounds=2, privacy={"noise_multiplier": 2.0})
    config = PrivacyConfig(noise_multiplier=2.0)
    assert world.run()["privacy"]["epsilon"] == 0
    for times in (1, 2):
        world.play()
        for device, task in holders(world):
            assert device.deliver(device.result(task)).status_code == 200
        world.play(2)
        told = world.run()["privacy"]
        assert told["participations"] == times
        assert told["epsilon"] == pytest.approx(epsilon_of(config, times))
        assert told["epsilon_at_end"] == pytest.approx(epsilon_of(config, 2))
    (first, *_) = world.run()["rounds"]
    assert (first["train_loss"], first["examples"], first["scores"]) == (None, 0, {})


def test_noise_on_devices_is_all_that_leaves_them(world: World) -> None:
    """With noise by devices the coordinator gets one vector with noise in it, and averages these."""
    private_fleet(world, "a", "b", "c")
    privacy = {"where": "device", "noise_multiplier": 1e-3, "clip_norm": 0.5}
    world.create_run(**WHOLE, rounds=1, privacy=privacy)
    world.play()
    mean: Any = 0
    for device, task in holders(world):
        assert task.protection is not None
        assert task.protection.noise_std == pytest.approx(5e-4)
        plain = device.deliver(device.result(task))
        assert (plain.status_code, plain.json()["code"]) == (422, "bad_slices")
        layout = layout_of(task, world.stores.manifest(task.package))
        mean += clipped(flat(layout, decode_values(device.result(task).change, world.specs)), 0.5) / 3
        assert device.deliver(protected(device, task)).json() == {"status": "counted"}
    world.play(2)
    assert world.round_state() == "committed"
    moved = decode_values(world.values(), world.specs)
    initial = decode_values(world.stores.blobs.get(task.state), world.specs)
    change = flat(layout, {name: moved[name] - initial[name] for name in moved})
    assert np.abs(change - mean).max() < 5e-3


def test_a_device_that_cannot_protect_is_not_asked(world: World) -> None:
    """An older runtime is told to be renewed, and no place waits for it."""
    old = world.fleet("old")[0]
    private_fleet(world, "a", "b", "c")
    world.create_run(**{**WHOLE, "devices_per_round": 4}, rounds=1, privacy=FAINT)
    world.play()
    answer = old.check_in()
    assert isinstance(answer, NotEligible)
    assert answer.code == "cannot_protect"
    assert sorted(device.name for device, _ in holders(world)) == ["a", "b", "c"]


def test_a_device_takes_part_no_more_often_than_it_may(world: World) -> None:
    """With ``most_rounds`` a device that had its rounds is not asked again, and ε is of as many."""
    private_fleet(world, "a", "b", "c", "d")
    privacy = {"noise_multiplier": 2.0, "most_rounds": 1}
    world.create_run(
        devices_per_round=2, min_devices=4, min_results=1, rounds=2, split="whole", privacy=privacy
    )
    seen: list[str] = []
    for _ in range(2):
        world.play()
        for device, task in holders(world):
            seen.append(device.name)
            device.deliver(device.result(task))
        world.play(2)
    assert sorted(seen) == ["a", "b", "c", "d"]
    assert world.run()["state"] == "finished"
    assert world.run()["privacy"]["participations"] == 1


@pytest.mark.parametrize(
    "privacy", [{"unit": "row"}, {"clip_norm": 3.0}, {"where": "device", "clip_norm": 3.0}]
)
def test_a_head_is_solved_from_noised_sums(world: World, privacy: dict[str, Any]) -> None:
    """Sums for a head in closed form get noise too, by row or by device, by the server or by devices."""
    private_fleet(world, "a", "b", "c")
    world.create_run(
        **VISIT,
        **{**WHOLE, "min_results": 1},
        privacy={"noise_multiplier": 0.05, **privacy},
    )
    world.play()
    for device, task in holders(world):
        plain = sums(device, task)
        manifest = world.stores.manifest(task.package, task.features, task.pooling)
        data = protect(task, manifest, plain.change, plain.examples, KEY)
        hides = task.protection is not None and task.protection.hides
        result = replace(
            plain, change=data, change_sha256=_sha256(data), examples=1 if hides else plain.examples
        )
        answer = device.deliver(result)
        assert answer.json() == {"status": "counted"}, answer.text
    world.play(2)
    assert world.round_state() == "committed"
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    (solved,) = [event for event in events if event["code"] == "head_solved"]
    assert "head in closed form of" in solved["message"]
    assert world.run()["privacy"]["epsilon"] > 0


def test_configuration_survives_the_way_to_json(world: World) -> None:
    """A configuration with privacy is read as it was written."""
    table = world.config(**WHOLE, privacy=FAINT)
    config = run_config(table)
    assert config.privacy is not None
    assert json.loads(json.dumps(table))["privacy"] == FAINT
    with pytest.raises(ConfigError, match="privacy"):
        run_config({**table, "privacy": {"epsilon": -1.0}})


def test_training_before_a_visit_is_private_too(world: World) -> None:
    """A run with rounds and a visit counts both."""
    private_fleet(world, "a", "b", "c")
    world.create_run(
        **WHOLE,
        **TRAINED,
        privacy={"noise_multiplier": 0.5},
    )
    assert world.run()["privacy"]["epsilon_at_end"] == pytest.approx(
        epsilon_of(PrivacyConfig(noise_multiplier=0.5), 2)
    )
