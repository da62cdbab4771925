"""Results in parts: a cut upload goes on where it stood, and nothing is kept that was not signed and wanted."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from coordinator.api.serve import ServeOptions, bind
from coordinator.rounds.retention import clear_out
from edge_runtime.agent.client import Client
from edge_runtime.agent.transport import HttpTransport
from edge_runtime.agent.uploads import deliver
from edge_runtime.errors import UnreachableError
from edge_runtime.protocol.messages import (
    MAX_RESULT_BYTES,
    PART_BYTES,
    ResultReceipt,
    Task,
    encode_result,
)
from tests.coordinator.conftest import FakeDevice, World, slice_spec
from tests.faults.cutting_proxy import Cut, cutting_proxy

#: Results of 800 kB: three parts and a little.
SPECS = (slice_spec("s0", 0, (1, 400, 500)), slice_spec("head", 1, (1, 2, 2), "head"))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[World, FakeDevice, Task, bytes]]:
    """A coordinator, a device with an open task, and its encoded result."""
    world = World(tmp_path, specs=SPECS)
    (device,) = world.fleet("a")
    world.create_run(
        devices_per_round=1,
        min_devices=1,
        rounds=1,
        deadline_s=3600.0,
        selection_timeout_s=3600.0,
        split="whole",
    )
    world.play()
    task = device.task()
    assert task is not None
    yield world, device, task, encode_result(device.result(task))
    world.stores.storage.close()


def upload_path(task: Task, body: bytes) -> str:
    """Where a result's parts go."""
    return f"/v1/tasks/{task.task_id}/upload/{hashlib.sha256(body).hexdigest()}"


def put(device: FakeDevice, task: Task, body: bytes, offset: int, part: bytes) -> Any:
    """The answer to a part."""
    return device.send("PUT", f"{upload_path(task, body)}/{offset}", part)


def test_parts_make_the_result(held: Any) -> None:
    """Part by part, across a restart, the result counts once, and its file is gone; asking again says so."""
    world, device, task, body = held
    for offset in range(0, len(body), PART_BYTES):
        assert device.send("GET", upload_path(task, body)).json()["received_bytes"] == offset
        answer = put(device, task, body, offset, body[offset : offset + PART_BYTES])
        assert answer.json()["received_bytes"] == min(len(body), offset + PART_BYTES)
        world.start()
    assert device.send("POST", upload_path(task, body)).json() == {"status": "counted"}
    assert list((world.folder / "state/uploads").iterdir()) == []
    assert device.send("GET", upload_path(task, body)).json() == {"received_bytes": 0, "counted": True}
    world.play()
    assert world.run()["state"] == "finished"


@pytest.mark.parametrize(
    ("offset", "part", "status", "code"),
    [
        (PART_BYTES + 1, b"x", 409, "wrong_offset"),
        (0, b"x", 409, "wrong_offset"),
        (PART_BYTES, b"", 400, "malformed"),
        (MAX_RESULT_BYTES, b"x", 413, "too_large"),
        (PART_BYTES, bytes((1 << 20) + 1), 413, "too_large"),
    ],
)
def test_a_part_that_does_not_fit_changes_nothing(
    held: Any, offset: int, part: bytes, status: int, code: str
) -> None:
    """A part from elsewhere, of no bytes or of too many is refused, and the upload stands where it stood."""
    world, device, task, body = held
    put(device, task, body, 0, body[:PART_BYTES])
    before = world.dump()
    answer = put(device, task, body, offset, part)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert world.dump() == before
    assert device.send("GET", upload_path(task, body)).json()["received_bytes"] == PART_BYTES


def test_only_the_tasks_own_device_and_only_while_it_is_wanted(held: Any) -> None:
    """Another device, a name that is no digest and a stopped run are refused, and what was begun is cleared out."""
    world, device, task, body = held
    (other,) = world.fleet("b")
    for method, path in (("GET", upload_path(task, body)), ("POST", upload_path(task, body))):
        assert other.send(method, path).json()["code"] == "not_your_task"
    assert put(other, task, body, 0, b"x").json()["code"] == "not_your_task"
    assert device.send("GET", f"/v1/tasks/{task.task_id}/upload/..%2f..").status_code in (400, 404, 405)
    assert device.send("GET", f"/v1/tasks/{task.task_id}/upload/{'A' * 64}").json()["code"] == "malformed"
    put(device, task, body, 0, body[:PART_BYTES])
    clear_out(world.stores, time.time())
    assert len(list((world.folder / "state/uploads").iterdir())) == 1
    world.admin("POST", "/v1/admin/runs/latest/stop")
    assert put(device, task, body, PART_BYTES, b"x").json()["code"] == "stale"
    clear_out(world.stores, time.time())
    assert list((world.folder / "state/uploads").iterdir()) == []


def test_damaged_parts_begin_anew(held: Any) -> None:
    """Bytes that are not those of the announced sha256 are dropped, and the way out of the message works."""
    world, device, task, body = held
    put(device, task, body, 0, body[:-1] + b"?")
    answer = device.send("POST", upload_path(task, body))
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    assert device.send("GET", upload_path(task, body)).json()["received_bytes"] == 0
    assert world.run()["rounds"][0]["results"] == 0
    put(device, task, body, 0, body)
    assert device.send("POST", upload_path(task, body)).json() == {"status": "counted"}


def test_a_task_has_one_upload(held: Any) -> None:
    """What was begun of another result of the task goes, so that a device cannot fill the disk."""
    world, device, task, body = held
    put(device, task, b"another", 0, b"anot")
    put(device, task, body, 0, body[:PART_BYTES])
    assert len(list((world.folder / "state/uploads").iterdir())) == 1


def test_a_refused_result_leaves_nothing(held: Any) -> None:
    """A result that does not fit its task is refused as one that came whole would be, and its parts are gone."""
    world, device, task, _ = held
    bad = encode_result(device.result(task, examples=999))
    put(device, task, bad, 0, bad)
    answer = device.send("POST", upload_path(task, bad))
    assert (answer.status_code, answer.json()["code"]) == (422, "too_many_examples")
    assert list((world.folder / "state/uploads").iterdir()) == []


def test_parts_are_signs_of_life(held: Any) -> None:
    """A device on a slow line that sends parts alone is not taken for lost."""
    world, device, task, body = held
    device.send("POST", f"/v1/tasks/{task.task_id}/alive")
    for number in range(3):
        world.clock.now_s += 170
        put(device, task, body, 10 * number, body[10 * number : 10 * number + 10])
        world.play()
        assert device.send("GET", upload_path(task, body)).status_code == 200
    world.clock.now_s += 190
    world.play()
    assert device.send("GET", upload_path(task, body)).json()["code"] == "stale"


@contextmanager
def serving(state: Path) -> Iterator[int]:
    """A coordinator on a state folder, on a port of loopback, until the end of the block."""
    server = bind(ServeOptions(state, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.server.started:
            time.sleep(0.01)
        yield int(urlsplit(server.url).port or 0)
    finally:
        server.stop()
        thread.join()


@pytest.mark.parametrize(
    ("cuts", "resent"),
    [
        # The first request asks how far the upload is, the last hands it in.
        ([None, None, "head", None, None, "body", None, None, "last byte"], 0.7),
        ([None, "answer", None, "answer", None, "half of the answer"], 0),
        ([None, None, None, None, None, "answer"], 0),  # the receipt is lost
    ],
)
def test_a_cut_upload_goes_on_where_it_stood(held: Any, cuts: list[Cut | None], resent: float) -> None:
    """Over a line that breaks off in heads, bodies, last bytes and answers, parts that arrived are not sent again."""
    world, device, task, body = held
    world.stores.storage.close()
    pauses: list[float] = []
    with serving(world.folder / "state") as port, cutting_proxy(port, cuts) as proxy:
        client = Client(HttpTransport(proxy.url), device.key, device.device_id)
        receipt = deliver(client, task.task_id, body, pauses.append)
        assert isinstance(receipt, ResultReceipt)
        assert proxy.cut == sum(cut is not None for cut in cuts) == len(pauses)
        assert proxy.body_bytes <= len(body) + resent * PART_BYTES
    world.start()
    with world.stores.storage.reading() as connection:
        assert connection.execute("SELECT count(*) FROM results").fetchone()[0] == 1


def test_a_line_that_brings_nothing_is_given_up(held: Any) -> None:
    """Where no more bytes arrive the attempt ends, and a later one goes on with the parts that are there."""
    world, device, task, body = held
    world.stores.storage.close()
    with serving(world.folder / "state") as port:
        with cutting_proxy(port, [None, None, "body", None, "body", None, "body"]) as proxy:
            client = Client(HttpTransport(proxy.url), device.key, device.device_id)
            with pytest.raises(UnreachableError):
                deliver(client, task.task_id, body, lambda _: None)
        with cutting_proxy(port) as proxy:
            client = Client(HttpTransport(proxy.url), device.key, device.device_id)
            assert deliver(client, task.task_id, body, lambda _: None) == ResultReceipt("counted")
            assert proxy.body_bytes < len(body) - PART_BYTES + 1
    world.start()
