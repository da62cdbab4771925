"""Visits for a head in closed form: each device once, whatever becomes of it, then training or the end."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load

from coordinator.aggregation.closed_form import solve
from edge_runtime.package.block_head import head_of
from edge_runtime.package.slices import decode_values
from edge_runtime.protocol.messages import Result, Task
from edge_runtime.training.feature_sums import FeatureSums, SumsBuilder, decode_sums, encode_sums, form_of
from tests.coordinator.conftest import FakeDevice, World
from tests.coordinator.rounds.test_state_machine import holders

WIDTH = 4
VISIT: dict[str, Any] = {"head": "closed_form", "slices": "none", "rounds": 0}
#: Two slices that lie before what the head reads, and rounds that train them.
TRAINED: dict[str, Any] = {"head": "closed_form", "slices": ["s0", "s1"], "rounds": 1, "features": [0]}


def rows_of(device: FakeDevice, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A device's features, of root mean square 1, and labels; both depend on its name alone."""
    random = np.random.default_rng(list(device.name.encode()))
    raw = random.standard_normal((rows, WIDTH))
    raw /= np.sqrt((raw * raw).mean(axis=1, keepdims=True))
    return raw.astype(np.float32), (raw[:, 0] > 0).astype(np.int64)


def sums(device: FakeDevice, task: Task, **changed: Any) -> Result:
    """What a real device would hand in."""
    features, labels = rows_of(device)
    builder = SumsBuilder(WIDTH, WIDTH, labels)
    builder.add(features, labels)
    data = encode_sums(builder.encoded(task.sums_dtype))
    result = replace(
        device.result(replace(task, train_head=False)),
        examples=len(labels),
        change=data,
        change_sha256=hashlib.sha256(data).hexdigest(),
    )
    return replace(result, **changed)


def visit_round(world: World) -> list[str]:
    """One round in which every device that is asked hands in its sums; their names."""
    world.play()
    asked = holders(world)
    for device, task in asked:
        answer = world.devices[device.name].deliver(sums(device, task))
        assert answer.json() == {"status": "counted"}, answer.text
    world.play()
    return [device.name for device, _ in asked]


def head_in(world: World) -> np.ndarray:
    """Weight of the head in the run's values."""
    manifest = world.stores.manifest(world.run()["package_sha256"], (0,), "package")
    return decode_values(world.values(), manifest.slices)["head/weight"]


def events(world: World, code: str) -> list[str]:
    """Messages of a run's events of some kind."""
    answer = world.admin("GET", "/v1/admin/runs/latest/events").json()
    return [event["message"] for event in answer if event["code"] == code]


def test_every_device_is_asked_once_and_the_run_ends(world: World) -> None:
    """Five devices by two: three rounds, nobody twice, and the head is that of all their rows."""
    devices = world.fleet(*"abcde")
    world.create_run(**VISIT)
    asked = [visit_round(world) for _ in range(3)]
    world.play()
    assert [len(names) for names in asked] == [2, 2, 1]
    assert sorted(name for names in asked for name in names) == list("abcde")
    run = world.run()
    assert (run["state"], run["reason"]) == ("finished", "every device was asked once")
    assert (run["rounds_committed"], run["rounds_wanted"]) == (3, 3)

    features, labels = (np.concatenate(parts) for parts in zip(*map(rows_of, devices), strict=True))
    one_hot = np.eye(2)[labels]
    beside = np.concatenate([np.ones((30, 1)), one_hot], axis=1)
    f = features.astype(np.float64)
    whole = FeatureSums(30, f.T @ f, f.T @ beside, one_hot.sum(0))
    told = events(world, "head_solved")
    assert len(told) == 3
    assert "of 30 rows" in told[-1]
    ridge = float(told[-1].split("ridge ")[1].split(",")[0])
    np.testing.assert_allclose(head_in(world), solve(whole, ridge).weight, rtol=1e-3, atol=1e-3)


def test_the_values_say_what_their_head_reads(world: World) -> None:
    """The file that operators fetch names the blocks and the pooling in its metadata."""
    world.fleet("a", "b")
    world.create_run(**VISIT)
    visit_round(world)
    assert head_of(world.values()) == ((0,), "mean")


def test_a_device_that_fails_or_is_silent_is_not_waited_for(world: World) -> None:
    """A visit is over when all were heard or asked twice: who stays silent is not asked a third time."""
    world.fleet(*"abcd")
    world.create_run(**VISIT, min_results=2)
    world.play()
    (device, task), *_ = holders(world)  # the other one stays silent from now on, or so it seems
    world.devices[device.name].deliver(sums(device, task))
    world.play()
    while world.run()["state"] == "running":
        world.clock.now_s += 70
        for name in "abcd":
            world.devices[name].check_in()
        world.play(2)
    run = world.run()
    assert (run["state"], run["rounds_wanted"]) == ("finished", run["rounds_committed"])
    assert "of 6 rows" in events(world, "head_solved")[-1]


def test_a_device_that_was_late_is_asked_once_more(world: World) -> None:
    """One that misses its deadline gets a second task, and its rows are part of the head."""
    world.fleet("a", "b")
    world.create_run(**VISIT)
    world.play()
    (first, task), (_, _) = holders(world)
    first.deliver(sums(first, task))
    world.clock.now_s += 70
    for device in world.devices.values():
        device.check_in()
    world.play(2)
    assert len(visit_round(world)) == 1
    world.play(2)
    assert world.run()["state"] == "finished"
    assert "of 12 rows" in events(world, "head_solved")[-1]


def test_a_visit_of_which_nothing_came_fails_and_says_so(world: World) -> None:
    """When no device hands in sums, the run fails and names how many were asked."""
    world.fleet("a", "b")
    world.create_run(**VISIT)
    for _ in range(2):
        world.play()
        assert len(holders(world)) == 2
        world.clock.now_s += 70
        world.play(2)
    world.play(2)
    run = world.run()
    assert run["state"] == "failed"
    assert "none of the 2 devices" in run["reason"]


@pytest.mark.parametrize(
    ("visit", "phases"),
    [
        ("last", ["training", "last_visit"]),
        ("first", ["first_visit", "training"]),
        ("first_and_last", ["first_visit", "training", "last_visit"]),
    ],
)
def test_visits_stand_where_they_are_asked_for(world: World, visit: str, phases: list[str]) -> None:
    """Sums are gathered before the rounds, after them, or both; slices are trained in between, the head with them."""
    devices = world.fleet("a", "b")
    world.create_run(**TRAINED, visit=visit)
    for phase in phases:
        world.play(2)
        tasks = [task for _, task in holders(world)]
        assert {task.head for task in tasks} == {"exact" if phase == "training" else "closed_form"}
        assert all(task.train_head for task in tasks)
        if phase == "training":
            for device in devices:
                task = device.task()
                assert task is not None
                assert device.deliver(trained(device, task)).json() == {"status": "counted"}
            world.play()
        else:
            assert sorted(visit_round(world)) == ["a", "b"]
    world.play(2)
    assert world.run()["state"] == "finished"
    assert world.run()["rounds_committed"] == len(phases)


def trained(device: FakeDevice, task: Task) -> Result:
    """A result of a training round, with a head as wide as the run's."""
    from edge_runtime.package.slices import encode_values

    shapes = {"s0/core": (1, 2), "s1/core": (1, 2, 2), "head/weight": (2, WIDTH), "head/bias": (2,)}
    names = {*task.slices, "head"}
    delta = {n: np.full(s, 0.1, np.float32) for n, s in shapes.items() if n.split("/")[0] in names}
    data = encode_values(delta)
    return replace(
        device.result(replace(task, train_head=False)),
        change=data,
        change_sha256=hashlib.sha256(data).hexdigest(),
    )


def test_a_restart_in_a_visit_loses_and_repeats_nothing(world: World) -> None:
    """After a kill between two rounds the visit goes on with those who were not asked, to the same bits."""
    world.fleet(*"abcd")
    world.create_run(**VISIT)
    first = visit_round(world)
    world.stores.storage.close()
    world.start()
    second = visit_round(world)
    world.play()
    assert sorted(first + second) == list("abcd")
    assert world.run()["state"] == "finished"
    assert "of 24 rows" in events(world, "head_solved")[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"examples": 7}, "6 rows came with 7 examples"),
        ({"change": b"no sums"}, "not a safetensors file"),
    ],
)
def test_sums_that_do_not_fit_are_refused_with_a_code(
    world: World, change: dict[str, Any], says: str
) -> None:
    """A result whose sums contradict it is refused as bad_sums, and nothing changes."""
    world.fleet("a", "b")
    world.create_run(**VISIT)
    world.play()
    device, task = holders(world)[0]
    before = world.dump()
    result = sums(device, task, **change)
    result = replace(result, change_sha256=hashlib.sha256(result.change).hexdigest())
    answer = device.deliver(result)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_sums")
    assert says in answer.json()["message"]
    assert world.dump() == before


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gram_0_0", lambda a: a + np.triu(np.full_like(a, 0.5), 1), "not symmetric"),
        ("gram_0_0", lambda a: a * np.float32(np.inf), "not finite"),
        ("gram_0_0", lambda a: a * np.float32(50), "allow"),
        ("linear", lambda a: a * np.float32(np.nan), "not finite"),
        ("counts", lambda a: -a, "whole numbers of rows"),
    ],
)
def test_sums_that_no_rows_have_are_refused_with_a_code(
    world: World, name: str, change: Any, says: str
) -> None:
    """Sums that are not symmetric, not finite or larger than their rows allow are bad_sums; nothing changes."""
    world.fleet("a", "b")
    world.create_run(**VISIT)
    world.play()
    device, task = holders(world)[0]
    before = world.dump()
    tensors = load(sums(device, task).change)
    data = encode_sums({**tensors, f"sums/{name}": change(tensors[f"sums/{name}"])})
    answer = device.deliver(sums(device, task, change=data, change_sha256=hashlib.sha256(data).hexdigest()))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_sums")
    assert says in answer.json()["message"]
    assert world.dump() == before


def test_sums_that_give_no_head_are_left_out_as_a_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what came gives no finite head, the round is abandoned with the names, and the visit goes on."""
    world.fleet(*"abcd")
    world.create_run(**VISIT)
    with monkeypatch.context() as patched:
        patched.setattr(np.linalg, "solve", singular)
        first = visit_round(world)
    (told,) = events(world, "round_abandoned")
    assert all(name in told for name in first)
    assert "none of it is kept" in told
    visit_round(world)
    world.play(2)
    assert world.run()["state"] == "finished"
    assert "of 12 rows" in events(world, "head_solved")[-1]


def singular(*_: Any) -> None:
    raise np.linalg.LinAlgError("Singular matrix")


def test_a_delta_in_a_visit_is_refused(world: World) -> None:
    """A device that trains where sums were asked for is refused."""
    world.fleet("a", "b")
    world.create_run(**VISIT)
    world.play()
    device, task = holders(world)[0]
    answer = device.deliver(device.result(task))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_sums")


def test_half_precision_travels_where_it_is_asked_for(world: World) -> None:
    """With sums_dtype = "float16" tasks ask for it, and such sums count."""
    world.fleet("a", "b")
    world.create_run(**VISIT, sums_dtype="float16")
    world.play()
    manifest = world.stores.manifest(world.run()["package_sha256"], (0,), "package")
    for device, task in holders(world):
        assert task.sums_dtype == "float16"
        result = sums(device, task)
        assert decode_sums(result.change, form_of(task, manifest)).rows == 6
        assert device.deliver(result).json() == {"status": "counted"}
    world.play(2)
    assert world.run()["state"] == "finished"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rounds": 0}, "rounds = 0 trains nothing"),
        ({"head": "closed_form", "slices": "none", "rounds": 3}, "set rounds = 0"),
        ({"head": "closed_form", "slices": ["s0"], "rounds": 0}, "one visit to each device"),
        ({"ridge": 0.1}, "ridge belongs to head"),
        ({"visit": "first"}, "visit belongs to head"),
        ({**VISIT, "ridge": 0}, "ridge"),
        ({**VISIT, "ridge": -0.1}, "ridge"),
        ({**VISIT, "ridge": 1e7}, "ridge"),
        ({**VISIT, "sums_projection": 100}, "multiple of 128; take 128"),
        ({**VISIT, "sums_projection": 128}, "not below the 4 features"),
        ({"sums_projection": 128}, "sums_projection = 128 belongs to head"),
        ({**VISIT, "continue_from": "no run"}, "continue_from"),
        ({**VISIT, "features": [1]}, "from 0"),
        ({**VISIT, "features": [0, 0]}, "once and in order"),
        ({"pooling": "max"}, "pooling"),
        ({"features": [0], "slices": ["s2"]}, "add a later block to features"),
        ({**VISIT, "train_head": False}, "train_head = false"),
        ({**TRAINED, "average_from_round": 0}, "average_from_round"),
    ],
)
def test_a_run_that_cannot_be_is_refused_when_it_is_created(
    world: World, changed: dict[str, Any], says: str
) -> None:
    """Settings that exclude each other, or blocks that the package lacks, are told at once by key."""
    before = world.dump()
    answer = world.admin("POST", "/v1/admin/runs", world.config(**changed))
    assert answer.status_code in (400, 422), answer.text
    assert says in answer.json()["message"]
    assert world.dump() == before
