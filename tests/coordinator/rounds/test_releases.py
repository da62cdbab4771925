"""Releases: which values are published, who is told of them, and devices that take no tasks."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, ComeBack, Release, SignedRelease, SignedTask
from edge_runtime.protocol.signing import verify
from tests.coordinator.conftest import FakeDevice, World


def check_in(device: FakeDevice, **said: Any) -> messages.CheckInResponse:
    """The answer to a check-in that says more than tests usually do."""
    request = CheckInRequest("test", device.cap_bytes, 1 << 20, 10, **said)
    answer = device.send("POST", "/v1/check-in", messages.encode(request))
    assert answer.status_code == 200, answer.text
    return messages.decode(answer.content, messages.CheckInResponse)  # type: ignore[arg-type]


def opened(world: World, signed: SignedRelease | None) -> Release:
    """The release, its signature verified by the coordinator's key."""
    assert signed is not None
    verify(world.stores.key.public_key, signed.release.encode(), signed.signature, what="the release")
    return messages.decode(signed.release.encode(), Release)


def publish(world: World, **asked: Any) -> Any:
    """Publish by the admin API."""
    return world.admin("POST", "/v1/admin/releases", asked)


@pytest.fixture
def finished(world: World) -> World:
    """A run of two rounds that has finished on two devices."""
    devices = world.fleet("a", "b")
    world.create_run()
    for _ in range(2):
        world.work(devices)
    assert world.run()["state"] == "finished"
    return world


def test_a_finished_run_becomes_a_release(finished: World) -> None:
    """Devices are told of it until they have decided, signed, with the values that fetch-slices gives."""
    answer = publish(finished, lowest_accuracy=0.5)
    assert answer.status_code == 201, answer.text
    told = finished.devices["a"].check_in()
    assert isinstance(told, ComeBack)
    release = opened(finished, told.release)
    assert (release.number, release.round, release.lowest_accuracy, release.highest_loss) == (1, 1, 0.5, None)
    blob = finished.devices["a"].send("GET", f"/v1/blobs/{release.values}").content
    assert blob == finished.values()
    assert hashlib.sha256(blob).hexdigest() == release.values
    assert release.sequence_limit == 16
    decided = check_in(finished.devices["a"], release=1)
    assert isinstance(decided, ComeBack)
    assert decided.release is None
    assert finished.admin("GET", "/v1/admin/releases").json()[0]["devices"] == 1


def test_an_earlier_round_can_be_published(finished: World) -> None:
    """The values after round 0 are those that round 1 started from; a later release has a higher number."""
    publish(finished)
    publish(finished, round=0)
    told = finished.devices["b"].check_in()
    release = opened(finished, told.release)
    assert (release.number, release.round) == (2, 0)
    assert (
        release.values
        == finished.stores.storage._connection.execute(
            "SELECT values_sha256 FROM rounds WHERE round = 1"
        ).fetchone()[0]
    )


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"run_id": "nothing"}, 404, "unknown_run"),
        ({"round": 7}, 404, "unknown_round"),
        ({"each_round": True}, 409, "run_ended"),
        ({"lowest_accuracy": 1.5}, 400, "malformed"),
        ({"highest_loss": -1}, 400, "malformed"),
    ],
)
def test_what_cannot_be_published_is_refused(
    finished: World, asked: dict[str, Any], status: int, code: str
) -> None:
    """Each has its code, and nothing is published."""
    answer = publish(finished, **asked)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert finished.admin("GET", "/v1/admin/releases").json() == []


def test_a_run_without_a_committed_round_has_nothing_to_publish(world: World) -> None:
    """Its values are those that the package started from."""
    world.fleet("a", "b")
    world.create_run()
    answer = publish(world)
    assert (answer.status_code, answer.json()["code"]) == (409, "nothing_to_release")


def test_each_further_round_becomes_a_release(world: World) -> None:
    """With ``each_round`` the second round is published as it commits, under the same limits."""
    devices = world.fleet("a", "b")
    world.create_run()
    world.work(devices)
    publish(world, each_round=True, highest_loss=2.0)
    world.work(devices)
    found = world.admin("GET", "/v1/admin/releases").json()
    assert [(each["number"], each["round"], each["highest_loss"]) for each in found] == [
        (1, 0, 2.0),
        (2, 1, 2.0),
    ]
    assert found[0]["values_sha256"] != found[1]["values_sha256"]
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    assert sum(event["code"] == "released" for event in events) == 2


def test_a_device_that_takes_no_tasks_gets_none(world: World) -> None:
    """It is told of releases, and no round waits for it."""
    devices = world.fleet("a", "b", "field")
    field = world.devices["field"]
    check_in(field, trains=False)
    world.create_run(devices_per_round=3, min_devices=2)
    world.play()
    assert isinstance(check_in(field, trains=False), ComeBack)
    tasks = [device.check_in() for device in devices[:2]]
    assert all(isinstance(task, SignedTask) for task in tasks)
    run = world.run()
    assert len(run["rounds"][0]["devices"]) <= 2


def test_releases_outlive_a_restart(finished: World) -> None:
    """After the coordinator starts anew, devices are told the very same bytes."""
    publish(finished)
    before = finished.devices["a"].check_in().release
    finished.stores.storage.close()
    finished.start()
    assert finished.devices["a"].check_in().release == before
