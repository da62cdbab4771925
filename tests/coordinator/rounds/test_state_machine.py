"""The round state machine: replacements, deadlines, abandonment, restarts, determinism."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.rounds import state_machine
from edge_runtime.errors import WorkerError
from edge_runtime.package.slices import decode_values
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import DeviceEvent, MemoryReport, Task
from edge_runtime.protocol.signing import generate_key
from edge_runtime.worker.jobs import EvaluateOutcome
from tests.coordinator.api.test_device_api import reserved
from tests.coordinator.conftest import LORA_SPECS, ROW, SPECS, FakeDevice, World


def holders(world: World) -> list[tuple[FakeDevice, Task]]:
    """Every device that gets a task when it checks in, with the task."""
    asked = [(device, device.task()) for device in world.devices.values()]
    return [(device, task) for device, task in asked if task is not None]


def test_waits_for_min_devices(world: World) -> None:
    """The first round does not open before enough devices have checked in."""
    world.fleet("a", "b")
    world.create_run(min_devices=3)
    world.play()
    assert world.run()["rounds"] == []
    world.fleet("c")
    world.play()
    assert world.round_state() == "selecting"


def test_states_of_a_round(world: World) -> None:
    """Selecting until all slots are taken, collecting until all results are in, then committed."""
    world.fleet("a", "b")
    world.create_run(rounds=1)
    world.play()
    assert world.round_state() == "selecting"
    tasks = holders(world)
    world.play()
    assert world.round_state() == "collecting"
    for device, task in tasks:
        device.deliver(device.result(task))
    world.play()
    assert world.round_state() == "committed"
    assert world.run()["state"] == "finished"


def test_head_goes_to_all_and_slices_are_covered(world: World) -> None:
    """Every task trains the head, and together they train every slice."""
    world.fleet("a", "b")
    world.create_run()
    world.play()
    tasks = [task for _, task in holders(world)]
    assert all(task.train_head for task in tasks)
    assert {name for task in tasks for name in task.slices} == {"s0", "s1", "s2"}


def test_whole_gives_every_place_everything(world: World) -> None:
    """Without a split every device trains all slices and the head, and the values move."""
    devices = world.fleet("a", "b")
    world.create_run(split="whole")
    world.play()
    assert [task.slices for _, task in holders(world)] == [("s0", "s1", "s2")] * 2
    before = world.values()
    world.work(devices)
    assert world.round_state() == "committed"
    assert world.values() != before


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_split_head_goes_where_it_was_dealt(world: World, count: int) -> None:
    """With a dealt head, tasks name slices alone, train_head says who has the head, and every round commits."""
    devices = world.fleet(*"abcdef"[:count])
    world.create_run(head_split=True, devices_per_round=count, min_devices=count, rounds=3)
    for number in range(3):
        world.play()
        tasks = [task for _, task in holders(world)]
        assert {name for task in tasks for name in task.slices} == {"s0", "s1", "s2"}
        assert sum(task.train_head for task in tasks) == 1
        assert all(task.slices or task.train_head for task in tasks)
        world.work(devices)
        assert world.run()["rounds_committed"] == number + 1
    assert world.run()["state"] == "finished"


def test_the_head_warms_up_alone(world: World) -> None:
    """The first committed rounds train the head alone; then slices are dealt as if they had turned all along."""
    devices = world.fleet("a", "b")
    world.create_run(rounds=4, head_warm_up_rounds=2)
    dealt = []
    for _ in range(4):
        world.play()
        tasks = [task for _, task in holders(world)]
        assert all(task.train_head for task in tasks)
        dealt.append([task.slices for task in sorted(tasks, key=lambda task: task.slot)])
        before = decode_values(world.values(), SPECS)
        world.work(devices)
        after = decode_values(world.values(), SPECS)
        moved = {name for name in after if not np.array_equal(after[name], before[name])}
        assert ("s0/core" in moved) == (len(dealt) > 2)
        assert "head/core" in moved
    assert dealt == [[(), ()], [(), ()], [("s0", "s2"), ("s1",)], [("s1",), ("s0", "s2")]]


def test_an_abandoned_round_warms_nothing_up(world: World) -> None:
    """Only committed rounds count as warm-up."""
    world.fleet("a", "b")
    world.create_run(rounds=2, head_warm_up_rounds=1, seen_window_s=600.0)
    world.play()
    for _ in range(2):  # each slot is offered to both
        world.clock.now_s += 11
        world.play()
    assert world.round_state() == "abandoned"
    world.play()
    assert world.run()["rounds"][-1]["round"] == 1
    assert [task.slices for _, task in holders(world)] == [(), ()]


def test_a_result_brings_what_its_place_was_dealt(world: World) -> None:
    """A head from a device that was not dealt it is refused, and nothing changes."""
    world.fleet("a", "b")
    world.create_run(head_split=True)
    world.play()
    device, task = next(pair for pair in holders(world) if not pair[1].train_head)
    before = world.dump()
    answer = device.deliver(device.result(replace(task, train_head=True)))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_slices")
    assert world.dump() == before


def test_silent_device_is_replaced(world: World) -> None:
    """A device that does not check in loses its slot to one outside the round; the slices stay."""
    devices = {device.name: device for device in world.fleet("a", "b", "c")}
    world.create_run()
    world.play()
    silent, active = (devices[name] for name in reserved(world))
    assert active.task() is not None
    world.clock.now_s += 11
    world.play()
    (name,) = set(devices) - {silent.name, active.name}
    assert reserved(world) == [name]
    task = devices[name].task()
    assert task is not None
    assert (task.slot, task.task_id.rpartition("-")[2]) == (0, "a1")
    assert silent.task() is None
    assert world.run()["rounds"][0]["failed"] == 1


@pytest.mark.parametrize("code", ["task_refused", "task_failed", "out_of_memory"])
def test_task_given_back(world: World, code: str) -> None:
    """A device that gives its task back is replaced at once and not asked for that slot again."""
    devices = world.fleet("a", "b", "c")
    world.create_run()
    world.play()
    (first, task), (second, _) = holders(world)
    first.send("POST", "/v1/events", messages.encode(DeviceEvent(code, "no", task.task_id)))
    world.play()
    (third,) = set(devices) - {first, second}
    replacement = third.task()
    assert replacement is not None
    assert (replacement.slot, replacement.slices) == (task.slot, task.slices)
    assert first.task() is None
    summary = world.run()["rounds"][0]
    assert (summary["refused"], summary["failed"]) == ((1, 0) if code == "task_refused" else (0, 1))


def test_late_device_is_replaced_while_results_are_wanting(world: World) -> None:
    """A device past its deadline loses its slot if there are too few results without it."""
    world.fleet("a", "b", "c")
    world.create_run(devices_per_round=1, min_devices=3, rounds=1)
    world.play()
    ((late, _),) = holders(world)
    world.clock.now_s += 61
    for device in world.devices.values():
        device.check_in()
    world.play()
    ((other, task),) = holders(world)
    assert other is not late
    other.deliver(other.result(task))
    world.play()
    assert world.run()["state"] == "finished"


def test_deadline_commits_with_enough(world: World) -> None:
    """After the deadline a round commits with what it has, if that is enough."""
    world.fleet("a", "b")
    world.create_run()
    world.play()
    (device, task), _ = holders(world)
    device.deliver(device.result(task))
    world.clock.now_s += 71
    world.play()
    assert world.run()["rounds"][0]["state"] == "committed"
    assert world.run()["rounds"][0]["devices"] == [device.name]


def test_abandoned_rounds_end_the_run(world: World) -> None:
    """Too few results and nobody left abandon the round; too many such rounds in a row fail the run."""
    world.fleet("a", "b")
    world.create_run(min_results=2)
    for _ in range(2):
        world.play()
        for device, task in holders(world):
            device.send("POST", "/v1/events", messages.encode(DeviceEvent("task_failed", "no", task.task_id)))
            world.play()
            for other, replacement in holders(world):
                event = DeviceEvent("task_failed", "no", replacement.task_id)
                other.send("POST", "/v1/events", messages.encode(event))
                world.play()
    run = world.run()
    assert run["state"] == "failed"
    assert "2 rounds abandoned in a row" in run["reason"]
    assert [entry["state"] for entry in run["rounds"]] == ["abandoned", "abandoned"]


def test_revoked_device_is_replaced(world: World) -> None:
    """Revocation frees the device's slot."""
    world.fleet("a", "b", "c")
    world.create_run()
    world.play()
    (first, _), (second, _) = holders(world)
    world.admin("POST", f"/v1/admin/devices/{first.name}/revoke")
    world.play()
    (name,) = reserved(world)
    assert name not in (first.name, second.name)


def test_runs_take_turns(world: World) -> None:
    """A second run waits until the first has ended."""
    devices = world.fleet("a", "b")
    first = world.create_run(rounds=1)
    second = world.create_run(rounds=1)
    world.work(devices)
    world.work(devices)
    states = {run["run_id"]: run["state"] for run in world.admin("GET", "/v1/admin/runs").json()}
    assert states == {first: "finished", second: "finished"}


def test_stop(world: World) -> None:
    """A stopped run abandons its round, keeps its values, and its tasks are stale."""
    world.fleet("a", "b")
    world.create_run()
    world.play()
    (device, task), _ = holders(world)
    values = world.values()
    answer = world.admin("POST", "/v1/admin/runs/latest/stop")
    assert (answer.status_code, answer.json()["was"]) == (200, "running")
    world.play()
    assert (world.run()["state"], world.round_state()) == ("stopped", "abandoned")
    assert device.deliver(device.result(task)).json()["code"] == "stale"
    assert world.values() == values


def test_overflow_abandons(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that cannot be stored as float32 abandon the round, whatever was let in."""
    monkeypatch.setattr("coordinator.aggregation.robust.ABSURD", float("inf"))
    world.fleet("a", "b")
    world.create_run(server_optimizer={"slices": {"rate": 1e6}, "head": {"rate": 1e6}})
    world.play()
    for device, task in holders(world):
        device.deliver(device.result(task, scale=1e35))
    values = world.values()
    world.play()
    assert world.run()["rounds"][0]["reason"] == "the averaged change overflowed"
    assert world.values() == values


ADAPTIVE = {"slices": {"name": "yogi", "rate": 0.1}, "head": {"name": "adam", "rate": 0.01}}


def play_run(
    world: World, restart_after: str | None, **options: object
) -> tuple[list[str], bytes, list[str]]:
    """A run of three rounds with a restart in its second round; who had which task, the final values, all blobs."""
    devices = world.fleet("a", "b", "c")
    world.create_run(**{"rounds": 3, "server_optimizer": ADAPTIVE, **options})
    ids: list[str] = []

    def stop(point: str) -> None:
        if point == restart_after and world.run()["rounds_committed"] == 1:
            world.start()
            world.clock.now_s += 3600
            state_machine.resume(world.stores, world.clock.now_s)
            world.play()

    for _ in range(3):
        world.play()
        stop("selecting")
        tasks = [(device, task) for device in devices if (task := device.task()) is not None]
        ids += [f"{task.round}.{task.slot} {device.name}" for device, task in tasks]
        world.play()
        stop("collecting")
        assert [task for _, task in tasks] == [device.task() for device, _ in tasks]
        for index, (device, task) in enumerate(tasks):
            device.deliver(device.result(task))
            if index == 0:
                stop("one counted")
        stop("all counted")
        if restart_after == "aggregating" and world.run()["rounds_committed"] == 1:
            close_without_aggregating(world)
            stop("aggregating")
        world.play()
        stop("committed")
    assert world.run()["state"] == "finished"
    return ids, world.values(), sorted(path.name for path in (world.folder / "state").glob("*/*/*"))


def close_without_aggregating(world: World) -> None:
    """Leave the round as a crash between closing and committing would."""
    with world.stores.storage.transaction() as connection:
        connection.execute("UPDATE rounds SET state = 'aggregating' WHERE state = 'collecting'")


POINTS = ["selecting", "collecting", "one counted", "all counted", "aggregating", "committed"]


@pytest.mark.parametrize("point", POINTS)
def test_restart_changes_nothing(tmp_path: Path, point: str) -> None:
    """Killed at any state and started again an hour later, a run ends with the same tasks and bytes."""
    assert_same(tmp_path, point)


OPTIONS: dict[str, dict[str, object]] = {
    "warm-up": {"head_warm_up_rounds": 1},
    "dealt head": {"head_split": True},
    "whole": {"split": "whole"},
    "normalised": {"normalise_steps": True},
    "frozen A": {"lora_aggregation": "frozen_a"},
    "products": {
        "lora_aggregation": "product_svd",
        "server_optimizer": {"head": {"name": "adam"}},
        "average_from_round": 1,
    },
    "averaged": {"average_from_round": 0},
    "gated": {"gate_variance": 1e-6, "min_results": 2},
    "sometimes gated": {"gate_variance": 1.0, "min_results": 2, "average_from_round": 0},
    "reference": {"directions": "filtered", "candidates": 4},
    "own rate": {"split": "whole", "server_optimizer": {"slices": {"name": "adam", "rate": "auto"}}},
}


@pytest.mark.parametrize("point", ["aggregating", "committed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_restart_changes_nothing_with(tmp_path: Path, options: dict[str, object], point: str) -> None:
    """The same holds for every option of the server: what it keeps comes back to the last bit."""
    assert_same(tmp_path, point, **options)


def assert_same(folder: Path, point: str, **options: object) -> None:
    """A run that was cut and one that was not give the same tasks, final values and stored blobs."""
    for name in ("whole", "cut"):
        (folder / name).mkdir()
    publisher, specs = generate_key(), LORA_SPECS if "lora_aggregation" in options else SPECS
    whole, cut = World(folder / "whole", publisher, specs), World(folder / "cut", publisher, specs)
    assert play_run(whole, None, **options) == play_run(cut, point, **options)


def test_results_leave_the_disk(world: World) -> None:
    """Once a round is committed, only the optimiser's state after each round remains beside the served blobs."""
    devices = world.fleet("a", "b")
    world.create_run(server_optimizer=ADAPTIVE)
    world.work(devices)
    world.work(devices)
    with world.stores.storage.reading() as connection:
        states = {row[0] for row in connection.execute("SELECT optimizer_sha256 FROM checkpoints")}
    assert {path.name for path in (world.folder / "state/private").rglob("*/*")} == states


def test_damaged_state_fails_the_run(world: World) -> None:
    """Values that are damaged on the disk end the run with a reason instead of entering a round."""
    devices = world.fleet("a", "b")
    world.create_run()
    sha256 = world.run()["values_sha256"]
    path = world.stores.blobs.find(sha256)
    assert path is not None
    path.write_bytes(b"damaged")
    world.work(devices)
    run = world.run()
    assert run["state"] == "failed"
    assert "damaged" in run["reason"]


# --- evaluation ---


def evaluate_all(world: World, monkeypatch: pytest.MonkeyPatch, *, broken: bool = False) -> list[int]:
    """Make the waiting evaluations with a stand-in for the worker; the rounds they were of."""
    from coordinator.rounds import evaluation

    def finish(process: object, kind: object) -> EvaluateOutcome:
        if broken:
            raise WorkerError("the worker was killed")
        return EvaluateOutcome(10, 0.75, 0.5, 1.0, MemoryReport(1, 1, 1))

    monkeypatch.setattr(evaluation, "start_worker", lambda job: None)
    monkeypatch.setattr(evaluation, "finish_worker", finish)
    made = []
    while (waiting := evaluation.next_evaluation(world.stores)) is not None:
        outcome = asyncio.run(evaluation.evaluate(waiting))
        with world.stores.storage.transaction() as connection:
            evaluation.store_evaluation(connection, waiting, outcome, now_s=world.clock.now_s)
        made.append(waiting.round)
        assert (Path(waiting.job.package_folder) / "manifest.json").is_file()
        assert Path(waiting.job.state_path).is_file()
    return made


@pytest.mark.parametrize("broken", [False, True])
def test_run_ends_with_its_last_evaluation(
    world: World, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Start, every second and the last round are evaluated; only then is the run finished."""
    data = world.folder / "dev.jsonl"
    data.write_text(ROW)
    devices = world.fleet("a", "b")
    world.create_run(rounds=3, evaluation={"data": str(data), "every_rounds": 2})
    for _ in range(3):
        world.work(devices)
    assert world.run()["state"] == "evaluating"
    assert evaluate_all(world, monkeypatch, broken=broken) == [-1, 1, 2]
    run = world.run()
    assert run["state"] == "finished"
    accuracies = [entry["accuracy"] for entry in run["rounds"]]
    assert accuracies == ([None] * 3 if broken else [None, 0.75, 0.75])


def test_backpropagation_needs_adjoint_programs(world: World) -> None:
    """A run that asks a package for what it does not hold is refused when it is created, with what to do."""
    answer = world.admin("POST", "/v1/admin/runs", world.config(update="backprop"))
    assert answer.status_code == 422, answer.text
    assert "--with-adjoint" in answer.text
    assert world.admin("GET", "/v1/admin/runs").json() == []
