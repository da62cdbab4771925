"""What a round comes to: means over rounds, references."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregation.own_rate import START
from coordinator.aggregation.server_state import ServerState
from edge_runtime.package.slices import Values, decode_values
from tests.coordinator.conftest import ROW, SPECS, World


def current(world: World) -> Values:
    """The values from which training goes on."""
    with world.stores.storage.reading() as connection:
        sha256 = connection.execute("SELECT values_sha256 FROM runs").fetchone()[0]
    return decode_values(world.stores.blobs.get(sha256), SPECS)


def test_the_mean_of_the_rounds_is_handed_over(world: World) -> None:
    """From its round on the mean is handed over, named in the summary and evaluated; tasks come with plain values."""
    data = world.folder / "dev.jsonl"
    data.write_text(ROW)
    devices = world.fleet("a", "b")
    world.create_run(rounds=4, average_from_round=1, evaluation={"data": str(data)})
    plain: list[Values] = []
    for number in range(4):
        world.play()
        tasks = [device.task() for device in devices]
        if plain:
            state = world.stores.blobs.get(tasks[0].state)
            assert all(
                np.array_equal(decode_values(state, SPECS)[name], plain[-1][name]) for name in plain[-1]
            )
        world.work(devices)
        plain.append(current(world))
        handed = decode_values(world.values(), SPECS)
        chosen = plain[1:] if number >= 1 else plain
        for name, array in handed.items():
            mean = sum(values[name].astype(np.float64) for values in chosen) / len(chosen)
            assert np.array_equal(array, mean.astype(np.float32))
    with world.stores.storage.reading() as connection:
        rows = connection.execute("SELECT values_sha256 FROM evaluations ORDER BY round").fetchall()
        trained = connection.execute("SELECT values_sha256 FROM runs").fetchone()[0]
    assert world.run()["values_sha256"] == rows[-1][0] != trained


def test_reference_of_filtered_directions(world: World) -> None:
    """Tasks name a blob with the last mean delta of every slice: none at first, zeros for what was never trained."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=3, slices=["s0", "s2"], directions="filtered", candidates=4)
    before = current(world)
    for number in range(3):
        world.play()
        tasks = [device.task() for device in devices]
        (reference,) = {task.reference for task in tasks}
        if number == 0:
            assert reference is None
        else:
            assert devices[0].send("GET", f"/v1/blobs/{reference}").status_code == 200
            values = decode_values(world.stores.blobs.get(reference), SPECS)
            assert not values["s1/core"].any()
            for name in ("s0/core", "s2/core", "head/core"):
                np.testing.assert_allclose(values[name], current(world)[name] - before[name], atol=1e-6)
            before = current(world)
        world.work(devices)


def test_other_directions_have_no_reference(world: World) -> None:
    """A run whose directions are compared with nothing stores and names no reference."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=2)
    world.work(devices)
    world.play()
    assert [device.task().reference for device in devices] == [None, None]


def test_a_rate_that_sets_itself_follows_what_devices_measure(world: World) -> None:
    """Tasks name the last step; slope and curvature along it make the next rate; devices without them weigh nothing."""
    devices = world.fleet("a", "b")
    devices[1].line = None
    optimizer = {"slices": {"name": "adam", "rate": "auto"}}
    world.create_run(rounds=3, server_optimizer=optimizer, slices=["s0", "s2"], split="whole")
    before, rates = current(world), []
    for number in range(3):
        world.play()
        (reference,) = {device.task().reference for device in devices}
        if number == 0:
            assert reference is None
        else:
            step = decode_values(world.stores.blobs.get(reference), SPECS)
            assert not step["s1/core"].any()
            np.testing.assert_array_equal(step["s0/core"], current(world)["s0/core"] - before["s0/core"])
        before = current(world)
        world.work(devices)
        with world.stores.storage.reading() as connection:
            sha256 = connection.execute("SELECT optimizer_sha256 FROM runs").fetchone()[0]
        rates.append(ServerState.decode(world.stores.private_blobs.get(sha256)).own.rate)
    # The fleet's slope of -1 and curvature of 4 say that each step should have been a quarter longer.
    np.testing.assert_allclose(rates[:2], [START, START * 1.25])
    assert START * 1.25 < rates[2] < START * 1.25**2


def test_a_flat_loss_leaves_the_rate_and_is_told(world: World) -> None:
    """Where devices find no curvature along a step that moved something, the rate stays and an event says so."""
    devices = world.fleet("a", "b")
    for device in devices:
        device.line = (0.0, 0.0)
    world.create_run(rounds=2, split="whole", server_optimizer={"slices": {"name": "adam", "rate": "auto"}})
    world.work(devices)
    world.work(devices)
    with world.stores.storage.reading() as connection:
        rows = connection.execute("SELECT message FROM events WHERE code = 'loss_flat'").fetchall()
    assert len(rows) == 1
    assert "stays as it was" in rows[0]["message"]
    assert all(np.isfinite(array).all() for array in current(world).values())


@pytest.mark.parametrize("line", [(np.nan, 1.0), (0.0, -1.0)])
def test_lines_that_make_no_sense_are_refused(world: World, line: tuple[float, float]) -> None:
    """Slopes that are not finite and curvatures below zero are refused with a code, and nothing has changed."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=2, split="whole", server_optimizer={"slices": {"name": "adam", "rate": "auto"}})
    world.work(devices)
    world.play()
    task = devices[0].task()
    devices[0].line = line
    answer = devices[0].deliver(devices[0].result(task))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_slices")
    devices[0].line = (-1.0, 4.0)
    assert devices[0].deliver(devices[0].result(task)).json() == {"status": "counted"}
