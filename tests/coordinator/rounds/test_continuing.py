"""Runs that go on from the sums of an earlier one: what has changed is all that travels, and the sums are exact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.aggregation.closed_form import solve
from coordinator.aggregation.server_state import ServerState
from coordinator.rounds import retention
from coordinator.storage import run_rows
from edge_runtime.protocol.messages import Result, Task
from edge_runtime.training.feature_sums import FeatureSums, SumsBuilder, encode_sums
from tests.coordinator.conftest import FakeDevice, World, write_package
from tests.coordinator.rounds.test_state_machine import holders
from tests.coordinator.rounds.test_visits import VISIT, WIDTH, events, head_in

#: What float32 leaves of a sum over a row, whose features have squares that sum to WIDTH.
ROUNDING = 1e-5


@dataclass
class Board:
    """A device with rows, which knows what it handed in, as the real one does."""

    device: FakeDevice
    features: np.ndarray
    labels: np.ndarray
    sent: dict[str, bytes] = field(default_factory=dict)

    def add(self, rows: int, label: int | None = None) -> None:
        """Give it more rows."""
        features, labels = rows_of(f"{self.device.name}{len(self.labels)}", rows)
        self.features = np.concatenate([self.features, features])
        self.labels = np.concatenate([self.labels, labels if label is None else np.full(rows, label)])

    def hand_in(self, task: Task, rows: slice | None, *, stands: bool) -> Result:
        """Sums of some rows, or none; what was handed in before stands, or comes back."""
        data = b"" if rows is None else encoded(self.features[rows], self.labels[rows], task.sums_dtype)
        digest = hashlib.sha256(data).hexdigest()
        self.sent[digest] = data
        result = self.device.result(replace(task, train_head=False))
        return replace(
            result,
            examples=0 if rows is None else len(self.labels[rows]),
            change=data,
            change_sha256=digest,
            kept=task.handed_in if stands else (),
            removed=() if stands else tuple(self.sent[part] for part in task.handed_in),
        )


def rows_of(name: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of root mean square 1 that tell the first two labels apart, by a name alone."""
    random = np.random.default_rng(list(name.encode()))
    raw = random.standard_normal((rows, WIDTH))
    raw /= np.sqrt((raw * raw).mean(axis=1, keepdims=True))
    return raw.astype(np.float32), (raw[:, 0] > 0).astype(np.int64)


def encoded(features: np.ndarray, labels: np.ndarray, dtype: str) -> bytes:
    builder = SumsBuilder(WIDTH, WIDTH, labels)
    builder.add(features, labels)
    return encode_sums(builder.encoded(dtype))


def directly(boards: list[Board], labels: int = 2) -> FeatureSums:
    """The sums of all present rows, as the formulas have them."""
    f = np.concatenate([board.features for board in boards]).astype(np.float64)
    one_hot = np.eye(labels)[np.concatenate([board.labels for board in boards])]
    beside = np.concatenate([np.ones((len(f), 1)), one_hot], axis=1)
    return FeatureSums(len(f), f.T @ f, f.T @ beside, one_hot.sum(axis=0))


def sums_in(world: World) -> FeatureSums:
    """The sums that the newest run holds."""
    with world.stores.storage.reading() as connection:
        row = run_rows.find_newest(connection)
    assert row is not None
    assert row.optimizer_sha256 is not None
    sums = ServerState.decode(world.stores.private_blobs.get(row.optimizer_sha256)).sums
    assert sums is not None
    return sums


def assert_same(got: FeatureSums, wanted: FeatureSums) -> None:
    assert got.rows == wanted.rows
    np.testing.assert_array_equal(got.counts, wanted.counts)
    np.testing.assert_allclose(got.gram, wanted.gram, atol=ROUNDING * wanted.rows * WIDTH)
    np.testing.assert_allclose(got.linear, wanted.linear, atol=ROUNDING * wanted.rows * WIDTH)


def boards_of(world: World, *names: str, rows: int = 6) -> dict[str, Board]:
    """Devices with rows of their own."""
    return {device.name: Board(device, *rows_of(device.name, rows)) for device in world.fleet(*names)}


def visit(world: World, boards: dict[str, Board], what: dict[str, tuple[slice | None, bool]]) -> None:
    """Play a whole visit; devices that are not named hand in all rows, or nothing if they did before."""
    while world.run()["state"] in ("queued", "running"):
        world.play()
        for device, task in holders(world):
            default = (None, True) if task.handed_in else (slice(None), False)
            rows, stands = what.get(device.name, default)
            answer = device.deliver(boards[device.name].hand_in(task, rows, stands=stands))
            assert answer.json() == {"status": "counted"}, answer.text
        world.play()


def test_rows_added_removed_and_changed_leave_the_sums_of_the_rows_that_are_there(world: World) -> None:
    """After additions, removals, an absence and a newcomer, sums and head are those of one visit to all."""
    boards = boards_of(world, *"abcd")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    assert_same(sums_in(world), directly(list(boards.values())))

    boards["a"].add(5)  # more rows
    boards["b"].features, boards["b"].labels = boards["b"].features[2:], boards["b"].labels[2:]  # fewer
    boards["c"].labels = 1 - boards["c"].labels  # changed; d stays as it is
    boards |= boards_of(world, "e")
    world.create_run(**VISIT, continue_from=earlier)
    visit(world, boards, {"a": (slice(6, None), True), "b": (slice(None), False), "c": (slice(None), False)})
    run = world.run()
    assert (run["state"], run["reason"]) == ("finished", "every device was asked once")
    wanted = directly(list(boards.values()))
    assert_same(sums_in(world), wanted)
    ridge = float(events(world, "head_solved")[-1].split("ridge ")[1].split(",")[0])
    np.testing.assert_allclose(head_in(world), solve(wanted, ridge).weight, rtol=1e-3, atol=1e-3)
    told = " ".join(events(world, "head_solved"))
    assert "took off what they had handed in before" in told
    assert "had nothing new" in told
    assert "of sums came from" in told


def test_a_chain_of_runs_asks_each_device_for_what_changed_since_it_was_last_heard(world: World) -> None:
    """A device that was away from the run between is named what it handed in before it; others what came of that."""
    boards = boards_of(world, "a", "b")
    first = world.create_run(**VISIT)
    visit(world, boards, {})
    world.clock.now_s += 10_000
    boards["a"].device.check_in()  # b is away
    boards["a"].add(3)
    second = world.create_run(**VISIT, continue_from=first, min_devices=1)
    visit(world, boards, {"a": (slice(6, None), True)})
    boards["b"].device.check_in()
    boards["a"].add(2)
    boards["b"].features, boards["b"].labels = boards["b"].features[:4], boards["b"].labels[:4]
    world.create_run(**VISIT, continue_from=second)
    world.play()
    named = {device.name: task.handed_in for device, task in holders(world)}
    assert (len(named["a"]), len(named["b"])) == (2, 1)
    assert set(named["a"]) <= set(boards["a"].sent)
    visit(world, boards, {"a": (slice(9, None), True), "b": (slice(None), False)})
    assert_same(sums_in(world), directly(list(boards.values())))


def test_sums_stay_with_the_earlier_run(world: World) -> None:
    """What goes on from a run leaves its sums as they are: another run may go on from it again, after a sweep too."""
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    for _ in range(2):
        world.create_run(**VISIT, continue_from=earlier)
        visit(world, boards, {})
        retention.clear_out(world.stores, world.clock.now_s + 1e9)
        assert_same(sums_in(world), directly(list(boards.values())))


def test_a_package_with_more_labels_keeps_the_sums_of_the_old_ones(world: World, tmp_path: Path) -> None:
    """New labels behind the old ones need rows of their own alone: the head then knows all of them."""
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    package = write_package(tmp_path / "wider", world.publisher, labels=("no", "yes", "maybe"))
    boards["a"].add(6, label=2)
    world.create_run(**VISIT, continue_from=earlier, package=str(package))
    visit(world, boards, {"a": (slice(6, None), True)})
    assert_same(sums_in(world), directly(list(boards.values()), labels=3))
    assert events(world, "head_solved")[-1].startswith("head in closed form of 18 rows")


def test_devices_that_took_all_rows_off_leave_nothing_of_them(world: World) -> None:
    """A device whose rows are all gone takes its sums off; where all did, the head is zero, and that is told."""
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    world.create_run(**VISIT, continue_from=earlier)
    visit(world, boards, {"a": (None, False)})
    assert_same(sums_in(world), directly([boards["b"]]))
    world.create_run(**VISIT, continue_from=earlier)
    visit(world, boards, {"a": (None, False), "b": (None, False)})
    assert world.run()["state"] == "finished"
    assert not head_in(world).any()
    told = events(world, "head_solved")[-1]
    assert "of 0 rows" in told
    assert "no device has rows of no, yes" in told


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kept": (), "removed": ()}, "it tells of 0 of the 1 sums"),
        ({"kept": ("0" * 64,)}, "which this device did not hand in"),
        ({"kept": (), "removed": (b"other sums",)}, "which this device did not hand in"),
    ],
)
def test_a_difference_that_does_not_fit_what_was_handed_in_is_refused(
    world: World, changed: dict[str, Any], says: str
) -> None:
    """Sums that a device never handed in cannot be taken off, nor forgotten, and nothing changes."""
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    world.create_run(**VISIT, continue_from=earlier)
    world.play()
    device, task = holders(world)[0]
    before = world.dump()
    result = boards[device.name].hand_in(task, slice(None), stands=True)
    answer = device.deliver(replace(result, **changed))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_difference")
    assert says in answer.json()["message"]
    assert world.dump() == before


def test_what_another_device_handed_in_cannot_be_taken_off(world: World) -> None:
    """A device that brings another's sums to take off is refused, even byte by byte."""
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    world.create_run(**VISIT, continue_from=earlier)
    world.play()
    (device, task), (other, _) = holders(world)
    result = boards[device.name].hand_in(task, slice(None), stands=False)
    stolen = tuple(boards[other.name].sent.values())[:1]
    answer = device.deliver(replace(result, removed=stolen))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_difference")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sums_dtype": "float16"}, "sums_dtype = float16, and the sums of run"),
        ({"pooling": "max"}, "pooling = max"),
        ({"sequence_limit": 8}, "texts are cut at 8 tokens"),
        ({"continue_from": "no-such-run"}, "list them with: edge-coordinator run list"),
        ({"head": "exact", "rounds": 2, "slices": "all"}, "give --one-visit"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_when_it_is_created(
    world: World, changed: dict[str, Any], says: str
) -> None:
    """Settings on which sums depend must be those of the earlier run, which must be there; told at once, by key."""
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)
    visit(world, boards, {})
    before = world.dump()
    answer = world.admin(
        "POST", "/v1/admin/runs", world.config(**{**VISIT, "continue_from": earlier, **changed})
    )
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["message"]
    assert world.dump() == before


def test_a_run_goes_on_from_the_same_model_alone_and_only_once_it_has_ended(
    world: World, tmp_path: Path
) -> None:
    """Another model, labels in another order, or a run that still gathers are refused, each with what to do."""
    other = write_package(tmp_path / "other", world.publisher, program=b"another program")
    turned = write_package(tmp_path / "turned", world.publisher, labels=("yes", "no"))
    boards = boards_of(world, "a", "b")
    earlier = world.create_run(**VISIT)

    def refused(**changed: Any) -> str:
        answer = world.admin(
            "POST", "/v1/admin/runs", world.config(**{**VISIT, "continue_from": earlier, **changed})
        )
        assert answer.status_code == 422, answer.text
        return str(answer.json()["message"])

    assert "wait for its end, or stop it with: edge-coordinator run stop" in refused()
    visit(world, boards, {})
    assert "another model" in refused(package=str(other))
    assert "labels of run" in refused(package=str(turned))
    stopped = world.create_run(**VISIT)
    world.admin("POST", f"/v1/admin/runs/{stopped}/stop")
    assert "nothing to go on from" in refused(continue_from=stopped)
    assert world.admin("POST", "/v1/admin/runs", world.config(**VISIT)).status_code == 201  # the way out
