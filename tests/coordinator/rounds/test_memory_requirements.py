"""What a task needs, and that nothing a device measured enters it."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import run_config
from coordinator.rounds.memory_requirements import required_bytes
from edge_runtime.package.manifest import parse_manifest
from edge_runtime.package.slices import decode_values
from tests.coordinator.conftest import SPECS, World

#: Floors as devices measure them: not yet, alike, and a few pages apart from one time to the next.
MEASURED = ([0], [90 << 20], [90 << 20, 91 << 20, 0, 300 << 20], [1 << 40])


def seats_and_values(folder: Path, floors: list[int]) -> tuple[list[tuple[str, int, int]], list[list[float]]]:
    """Who sat where in three rounds, and the values at the end, with devices that measure such floors."""
    folder.mkdir()
    world = World(folder)
    for index, name in enumerate("abcdef"):
        world.fleet(name)
        world.devices[name].cap_bytes = needed(world) + (index % 3) * 4096
        world.devices[name].check_in()
    world.create_run(rounds=3, devices_per_round=4, min_devices=6, min_results=4)
    turn = 0
    for _ in range(3):
        world.play()
        for device in world.devices.values():
            device.floor_bytes = floors[turn % len(floors)]
            turn += 1
            task = device.task()
            if task is not None:
                assert device.deliver(device.result(task)).status_code == 200
        world.play()
    with world.stores.storage.reading() as connection:
        rows = connection.execute(
            "SELECT name, round, slot FROM tasks JOIN devices USING (device_id) WHERE state = 'counted'"
            " ORDER BY round, slot"
        ).fetchall()
    values = [array.ravel().tolist() for array in decode_values(world.values(), SPECS).values()]
    world.stores.storage.close()
    return [tuple(row) for row in rows], values


def needed(world: World) -> int:
    """What any task of the tests' run needs."""
    manifest = parse_manifest((world.package / "manifest.json").read_bytes())
    return required_bytes(manifest, run_config(world.config()), ["s0", "s1", "s2", "head"])


@pytest.mark.parametrize("floors", MEASURED[1:], ids=["alike", "apart", "absurd"])
def test_seats_and_bits_hang_on_nothing_measured(tmp_path: Path, floors: list[int]) -> None:
    """The same seed and names seat the same devices and end in the same bits, whatever memory devices measured."""
    expected = seats_and_values(tmp_path / "first", MEASURED[0])
    assert len(expected[0]) == 12
    assert seats_and_values(tmp_path / "second", floors) == expected
