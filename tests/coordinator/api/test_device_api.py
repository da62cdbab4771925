"""Requests of devices: who is let in, what is served, what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.package.slices import decode_values, encode_values
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import (
    MAX_CONTROL_BYTES,
    MAX_RESULT_BYTES,
    CheckInRequest,
    ComeBack,
    DeviceEvent,
    EnrolRequest,
    NotEligible,
    Refusal,
    Result,
    SignedTask,
    Task,
)
from edge_runtime.protocol.signing import generate_key, sign_request, verify
from edge_runtime.training.replay import replay
from tests.coordinator.api.raw import raw_request
from tests.coordinator.conftest import SPECS, FakeDevice, World

CHECK_IN = messages.encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))


def code_of(answer: Any, status: int) -> str:
    """The code of a refusal, after checking its status and form."""
    assert answer.status_code == status, answer.text
    return messages.decode(answer.content, Refusal).code


def open_task(world: World, **run: Any) -> tuple[FakeDevice, Task]:
    """A device with a task, in a round of two; ``run`` changes keys of the run."""
    devices = world.fleet("a", "b")
    world.create_run(**run)
    world.play()
    task = devices[0].task()
    assert task is not None
    return devices[0], task


def result_with(device: FakeDevice, task: Task, values: dict[str, Any]) -> Result:
    """A result that brings exactly these tensors."""
    data = encode_values(values)
    return device.result(task, change=data, change_sha256=hashlib.sha256(data).hexdigest())


def honest(task: Task) -> dict[str, Any]:
    """Zero changes of the right shapes."""
    shapes = {"s0": (1, 2), "s1": (1, 2, 2), "s2": (1, 3), "head": (1, 2, 2)}
    return {f"{name}/core": np.zeros(shapes[name], np.float32) for name in (*task.slices, "head")}


# --- signatures ---


def test_unsigned(world: World) -> None:
    """A request without signature headers is refused."""
    world.fleet("a")
    before = world.dump()
    answer = world.client.post("/v1/check-in", content=CHECK_IN)
    assert code_of(answer, 401) == "unsigned"
    assert world.dump() == before


def test_replayed(world: World) -> None:
    """The same signed bytes are accepted once, also after a restart."""
    (device,) = world.fleet("a")
    headers = device.headers("POST", "/v1/check-in", CHECK_IN)
    assert world.client.post("/v1/check-in", content=CHECK_IN, headers=headers).status_code == 200
    before = world.stores.storage.dump()
    assert code_of(world.client.post("/v1/check-in", content=CHECK_IN, headers=headers), 401) == "replayed"
    world.start()
    assert code_of(world.client.post("/v1/check-in", content=CHECK_IN, headers=headers), 401) == "replayed"
    assert world.stores.storage.dump() == before


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"now_s": 1_700_000_000 + 301}, "clock_off"),
        ({"now_s": 1_700_000_000 - 301}, "clock_off"),
        ({"path": "/v1/events"}, "bad_signature"),
        ({"method": "PUT"}, "bad_signature"),
        ({"device_id": "d-0000"}, "unknown_device"),
    ],
)
def test_wrongly_signed(world: World, changed: dict[str, Any], code: str) -> None:
    """A signature of another time, path, method or device is refused, and uses up no nonce."""
    (device,) = world.fleet("a")
    before = world.stores.storage.dump()
    headers = device.headers(**{"method": "POST", "path": "/v1/check-in", "body": CHECK_IN, **changed})
    assert code_of(world.client.post("/v1/check-in", content=CHECK_IN, headers=headers), 401) == code
    assert world.stores.storage.dump() == before


def test_another_body_than_was_signed(world: World) -> None:
    """A body that its signed digest does not fit changes nothing, and its headers serve no other."""
    (device,) = world.fleet("a")
    before = world.dump()
    headers = device.headers("POST", "/v1/check-in", b"{}")
    answer = world.client.post("/v1/check-in", content=CHECK_IN, headers=headers)
    assert code_of(answer, 401) == "bad_signature"
    assert code_of(world.client.post("/v1/check-in", content=b"{}", headers=headers), 401) == "replayed"
    assert world.dump() == before


def test_signed_by_another_key(world: World) -> None:
    """A device cannot speak for another."""
    first, second = world.fleet("a", "b")
    headers = second.headers("POST", "/v1/check-in", CHECK_IN, device_id=first.device_id)
    assert (
        code_of(world.client.post("/v1/check-in", content=CHECK_IN, headers=headers), 401) == "bad_signature"
    )


def test_clock_within_bounds(world: World) -> None:
    """300 seconds either way are accepted."""
    (device,) = world.fleet("a")
    for off_s in (-300, 300):
        headers = device.headers("POST", "/v1/check-in", CHECK_IN, now_s=int(world.clock()) + off_s)
        assert world.client.post("/v1/check-in", content=CHECK_IN, headers=headers).status_code == 200


def test_revoked(world: World) -> None:
    """Revocation takes effect at the next request."""
    (device,) = world.fleet("a")
    answer = world.admin("POST", "/v1/admin/devices/a/revoke")
    assert (answer.status_code, answer.json()["name"]) == (200, "a")
    before = world.dump()
    assert code_of(device.send("POST", "/v1/check-in", CHECK_IN), 403) == "revoked"
    assert world.dump() == before


def test_query_is_refused(world: World) -> None:
    """A query would not be signed, so there is none."""
    (device,) = world.fleet("a")
    headers = device.headers("POST", "/v1/check-in", CHECK_IN)
    answer = world.client.post("/v1/check-in?x=1", content=CHECK_IN, headers=headers)
    assert code_of(answer, 400) == "query_refused"


@pytest.mark.parametrize(
    ("method", "path", "limit"),
    [("POST", "/v1/check-in", MAX_CONTROL_BYTES), ("PUT", "/v1/tasks/t/result", MAX_RESULT_BYTES)],
)
def test_too_large_before_it_is_read(world: World, method: str, path: str, limit: int) -> None:
    """A body announced as too large is refused without being read."""
    (device,) = world.fleet("a")
    headers = {**device.headers(method, path, b""), "Content-Length": str(limit + 1)}
    before = world.dump()
    assert code_of(world.client.request(method, path, content=b"", headers=headers), 413) == "too_large"
    assert world.dump() == before


def test_too_large_while_it_is_read(world: World) -> None:
    """A body that does not announce its size is cut off at the limit."""
    (device,) = world.fleet("a")
    headers = device.headers("POST", "/v1/check-in", b"")
    chunks = (b" " * 65536 for _ in range(17))
    assert code_of(world.client.post("/v1/check-in", content=chunks, headers=headers), 413) == "too_large"


def test_nothing_is_read_of_strangers(world: World) -> None:
    """Of a body whose sender is not known not a byte is asked for; a request to enrol is small."""
    (device,) = world.fleet("a")
    read: list[int] = []

    def chunks() -> Iterator[bytes]:
        for _ in range(8):
            read.append(1)
            yield b" " * 65536

    path = "/v1/tasks/t/result"
    stranger = generate_key()
    forged = {
        **device.headers("PUT", path, b""),
        **sign_request(
            stranger,
            device_id=device.device_id,
            method="PUT",
            path=path,
            body=b"",
            now_s=int(world.clock()),
            nonce="x" * 9,
        ),
    }
    for headers, code in (({}, "unsigned"), (forged, "bad_signature")):
        read.clear()
        assert code_of(raw_request(world, "PUT", path, headers, chunks()), 401) == code
        assert not read
    assert code_of(raw_request(world, "POST", "/v1/admin/runs", {}, chunks()), 401) == "not_admin"
    assert not read
    assert code_of(raw_request(world, "POST", "/v1/devices/enrol", {}, chunks()), 413) == "too_large"
    assert len(read) == 1
    assert code_of(raw_request(world, "GET", "/healthz", {}, chunks()), 413) == "too_large"


def test_bodies_of_operators_are_bounded(world: World) -> None:
    """A body of the admin API that is over the limit is refused, announced or not, and nothing changes."""
    headers = {"Authorization": f"Bearer {world.app.state.app_state.admin_token}"}
    before = world.dump()
    announced = {**headers, "Content-Length": str(MAX_CONTROL_BYTES + 1)}
    answer = world.client.post("/v1/admin/tokens", content=b"", headers=announced)
    assert code_of(answer, 413) == "too_large"
    chunks = (b" " * 65536 for _ in range(17))
    answer = world.client.post("/v1/admin/tokens", content=chunks, headers=headers)
    assert code_of(answer, 413) == "too_large"
    assert world.dump() == before


# --- enrolling ---


def enrol(world: World, token: str, name: str, public_key: str) -> Any:
    """One enrolment request."""
    request = EnrolRequest(token, name, "generic", public_key)
    return world.client.post("/v1/devices/enrol", content=messages.encode(request))


def test_token_is_for_one_device(world: World) -> None:
    """A token serves one device; the same device may repeat itself, another may not."""
    token = world.admin("POST", "/v1/admin/tokens", {}).json()["token"]
    key, other = generate_key().public_key, generate_key().public_key
    first = enrol(world, token, "a", key)
    assert first.status_code == 201
    assert first.json()["coordinator_public_key"] == world.stores.key.public_key
    before = world.dump()
    assert enrol(world, token, "a", key).json() == first.json()
    assert code_of(enrol(world, token, "b", other), 401) == "token_used"
    assert code_of(enrol(world, token, "a", other), 401) == "token_used"
    assert world.dump() == before


def test_bad_tokens(world: World) -> None:
    """Unknown and expired tokens are refused, and so is a name in use; nothing changes."""
    key = generate_key().public_key
    token = world.admin("POST", "/v1/admin/tokens", {"valid_s": 10}).json()["token"]
    world.fleet("a")
    before = world.dump()
    assert code_of(enrol(world, "x" * 32, "b", key), 401) == "unknown_token"
    assert code_of(enrol(world, token, "a", key), 409) == "name_taken"
    world.clock.now_s += 11
    assert code_of(enrol(world, token, "b", key), 401) == "token_expired"
    assert world.dump() == before


def test_malformed_messages(world: World) -> None:
    """What does not parse is refused with the field's name."""
    (device,) = world.fleet("a")
    before = world.dump()
    for body in (b"", b"{", b"[]", b'{"runtime_version": "x"}', CHECK_IN.replace(b"1073741824", b"-5")):
        answer = device.send("POST", "/v1/check-in", body)
        assert code_of(answer, 400) == "malformed"
    assert "cap_bytes" in answer.text
    assert world.dump() == before


# --- checking in ---


def test_answers_without_work(world: World) -> None:
    """Without a run, before enough devices, unselected and after the end: each has its reason and window."""
    (first,) = world.fleet("a")
    assert first.check_in().reason == "no run"
    world.create_run(rounds=1)
    world.play()
    assert first.check_in() == ComeBack(0.3, 0.6, "waiting for devices")
    devices = [first, *world.fleet("b", "c")]
    world.play()
    answers = [device.check_in() for device in devices]
    assert [answer for answer in answers if not isinstance(answer, SignedTask)] == [
        ComeBack(0.3, 0.6, "not selected")
    ]
    world.work(devices)
    finished = first.check_in()
    assert finished.reason == "run finished"
    assert (finished.after_min_s, finished.after_max_s) == (5.0, 15.0)


def test_task_is_signed_and_repeated(world: World) -> None:
    """A task is signed by the coordinator and answered again byte for byte, also after a restart."""
    device, task = open_task(world)
    first, second = device.check_in(), device.check_in()
    assert first == second
    verify(world.stores.key.public_key, first.task.encode(), first.signature, what="task")
    assert task.round == 0
    assert task.required_bytes > 0
    verify(
        world.publisher.public_key,
        world.stores.blobs.get(task.package),
        task.package_signature,
        what="package",
    )
    world.start()
    assert device.check_in() == first


def test_cap_too_small(world: World) -> None:
    """A device whose cap is under the prediction is told both numbers, once recorded, and never asked."""
    small = FakeDevice(world, "small", cap_bytes=1000)
    small.enrol()
    small.check_in()
    world.fleet("a", "b")
    world.create_run(devices_per_round=3, min_devices=3)
    world.play()
    answers = [small.check_in() for _ in range(3)]
    assert all(isinstance(answer, NotEligible) and answer.code == "cap_too_small" for answer in answers)
    assert "1000" in answers[0].message
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    assert [event["device"] for event in events if event["code"] == "cap_too_small"] == ["small"]
    assert len(world.stores.storage.dump()) > 0
    slots = {device.task().slot for device in (world.devices["a"], world.devices["b"])}  # type: ignore[union-attr]
    assert slots == {0, 1}


def test_cap_lowered_after_selection(world: World) -> None:
    """A device that grants less than when it was chosen loses its slot to another."""
    devices = world.fleet("a", "b", "c")
    world.create_run(devices_per_round=1)
    world.play()
    chosen = next(device for device in devices if device.name == reserved(world)[0])
    chosen.cap_bytes = 1000
    assert chosen.check_in().code == "cap_too_small"
    world.play()
    assert len(reserved(world)) == 1
    assert reserved(world) != [chosen.name]


def reserved(world: World) -> list[str]:
    """Names of devices that a slot is kept for."""
    with world.stores.storage.reading() as connection:
        rows = connection.execute(
            "SELECT name FROM tasks JOIN devices USING (device_id) WHERE state = 'reserved' ORDER BY slot"
        )
        return [row["name"] for row in rows]


# --- results ---


def non_finite(device: FakeDevice, task: Task, value: float) -> Result:
    """A result with one bad number."""
    values = honest(task)
    values["head/core"][0, 1, 1] = value
    return result_with(device, task, values)


REFUSED: dict[str, tuple[Callable[[FakeDevice, Task], Result], int, str]] = {
    "nan": (lambda d, t: non_finite(d, t, float("nan")), 422, "bad_slices"),
    "inf": (lambda d, t: non_finite(d, t, float("inf")), 422, "bad_slices"),
    "nan loss": (lambda d, t: d.result(t, mean_loss=float("nan")), 422, "not_finite"),
    "wrong shape": (
        lambda d, t: result_with(d, t, {**honest(t), "head/core": np.zeros((4,), np.float32)}),
        422,
        "bad_slices",
    ),
    "unknown slice": (
        lambda d, t: result_with(d, t, {**honest(t), "other/core": np.zeros(2, np.float32)}),
        422,
        "bad_slices",
    ),
    "slice of another device": (
        lambda d, t: result_with(
            d,
            t,
            {
                **honest(t),
                **{f"{n}/core": np.zeros((1, 2), np.float32) for n in {"s0", "s1", "s2"} - {*t.slices}},
            },
        ),
        422,
        "bad_slices",
    ),
    "missing slice": (
        lambda d, t: result_with(d, t, {"head/core": np.zeros((1, 2, 2), np.float32)}),
        422,
        "bad_slices",
    ),
    "no safetensors": (
        lambda d, t: d.result(t, change=b"junk", change_sha256=hashlib.sha256(b"junk").hexdigest()),
        422,
        "bad_slices",
    ),
    "digest mismatch": (lambda d, t: d.result(t, change_sha256="0" * 64), 422, "digest_mismatch"),
    "another round": (lambda d, t: d.result(t, round=t.round + 1), 409, "stale"),
    "another run": (lambda d, t: d.result(t, run_id="other"), 409, "stale"),
    "too many examples": (lambda d, t: d.result(t, examples=13), 422, "too_many_examples"),
}


@pytest.mark.parametrize(("make", "status", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_result_changes_nothing(
    world: World, make: Callable[[FakeDevice, Task], Result], status: int, code: str
) -> None:
    """A result that does not fit is refused with its code and leaves no trace; the honest one counts."""
    device, task = open_task(world)
    before = world.dump()
    assert code_of(device.deliver(make(device, task)), status) == code
    assert world.dump() == before
    assert not list((world.folder / "state/private").rglob("*/*"))
    assert device.deliver(device.result(task)).json() == {"status": "counted"}


def test_malformed_results(world: World) -> None:
    """Bytes that are no Result, and a result sent to another task's address, are refused."""
    device, task = open_task(world)
    path = f"/v1/tasks/{task.task_id}/result"
    before = world.dump()
    body = msgspec.msgpack.encode({"task_id": task.task_id})
    for bad in (b"", b"\xc1", b"{}", body):
        assert code_of(device.send("PUT", path, bad), 400) == "malformed"
    assert code_of(device.deliver(device.result(task, task_id="other"), task.task_id), 400) == "malformed"
    assert code_of(device.deliver(device.result(task), "no-such-task"), 404) == "unknown_task"
    assert world.dump() == before


def test_result_of_another_device(world: World) -> None:
    """Nobody delivers for another device."""
    device, task = open_task(world)
    other = next(one for one in world.devices.values() if one is not device)
    before = world.dump()
    assert code_of(other.deliver(other.result(task)), 409) == "not_your_task"
    assert world.dump() == before


def test_same_result_counts_once(world: World) -> None:
    """Sent again it is a duplicate, also after the round has closed; another one is a conflict."""
    device, task = open_task(world)
    other = next(one for one in world.devices.values() if one is not device)
    result = device.result(task)
    assert device.deliver(result).json() == {"status": "counted"}
    before = world.dump()
    assert device.deliver(result).json() == {"status": "duplicate"}
    assert code_of(device.deliver(device.result(task, scale=2.0)), 409) == "conflict"
    assert world.dump() == before
    second = other.task()
    assert second is not None
    other.deliver(other.result(second))
    world.play()
    assert device.deliver(result).json() == {"status": "duplicate"}
    assert world.run()["rounds"][0]["results"] == 2


def test_stale_result(world: World) -> None:
    """A result that comes after its round has closed is refused and changes nothing."""
    device, task = open_task(world)
    world.clock.now_s += 100
    world.play(3)
    before, values = world.dump(), world.values()
    assert code_of(device.deliver(device.result(task)), 409) == "stale"
    assert (world.dump(), world.values()) == (before, values)


# --- events and blobs ---


def test_events(world: World) -> None:
    """Events are recorded; one about another's task, or giving back no task, is refused."""
    device, task = open_task(world)
    other = next(one for one in world.devices.values() if one is not device)
    assert (
        device.send("POST", "/v1/events", messages.encode(DeviceEvent("hot", "71 degrees"))).status_code
        == 204
    )
    before = world.dump()
    refused = messages.encode(DeviceEvent("task_refused", "no", task.task_id))
    assert code_of(other.send("POST", "/v1/events", refused), 409) == "not_your_task"
    unknown = messages.encode(DeviceEvent("task_failed", "no", "no-such-task"))
    assert code_of(device.send("POST", "/v1/events", unknown), 404) == "unknown_task"
    assert (
        code_of(device.send("POST", "/v1/events", b'{"code": "task_failed", "message": ""}'), 400)
        == "malformed"
    )
    assert world.dump() == before
    events = world.admin("GET", "/v1/admin/runs/latest/events").json()
    assert ("hot", "71 degrees") in [(event["code"], event["message"]) for event in events]


@pytest.fixture
def blob(world: World) -> tuple[FakeDevice, str, bytes]:
    """A device, the path of a package file, and its bytes."""
    (device,) = world.fleet("a")
    world.create_run()
    data = (world.package / "programs.onnx").read_bytes()
    return device, f"/v1/blobs/{hashlib.sha256(data).hexdigest()}", data


def test_blob_whole(blob: tuple[FakeDevice, str, bytes]) -> None:
    """A blob comes with a strong ETag and its length; If-None-Match spares it."""
    device, path, data = blob
    answer = device.send("GET", path)
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["etag"] == f'"{path[-64:]}"'
    assert answer.headers["content-length"] == str(len(data))
    assert device.send("GET", path, **{"If-None-Match": answer.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=100-", 100, 1300),
        ("bytes=-7", 1293, 1300),
        ("bytes=1290-9999", 1290, 1300),
    ],
)
def test_blob_range(blob: tuple[FakeDevice, str, bytes], asked: str, first: int, end: int) -> None:
    """One byte range is answered with 206 and says which bytes it is."""
    device, path, data = blob
    answer = device.send("GET", path, Range=asked)
    assert (answer.status_code, answer.content) == (206, data[first:end])
    assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{len(data)}"
    assert answer.headers["content-length"] == str(end - first)


def test_blob_range_refused_or_ignored(blob: tuple[FakeDevice, str, bytes]) -> None:
    """A range past the end is 416; a form that is not understood, or another If-Range, gets the whole."""
    device, path, data = blob
    answer = device.send("GET", path, Range=f"bytes={len(data)}-")
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(data)}")
    assert device.send("GET", path, Range="bytes=-0").status_code == 416
    for headers in (
        {"Range": "bytes=1-2,4-5"},
        {"Range": "bytes=5-2"},
        {"Range": "bytes=1-", "If-Range": '"x"'},
    ):
        answer = device.send("GET", path, **headers)
        assert (answer.status_code, answer.content) == (200, data)
    resumed = device.send("GET", path, Range="bytes=1-", **{"If-Range": f'"{path[-64:]}"'})
    assert resumed.status_code == 206


def test_blobs_need_a_signature_and_a_name(blob: tuple[FakeDevice, str, bytes], world: World) -> None:
    """Unsigned requests, unknown digests and other names get nothing; results of devices are never served."""
    device, path, _ = blob
    assert code_of(world.client.get(path), 401) == "unsigned"
    assert code_of(device.send("GET", f"/v1/blobs/{'0' * 64}"), 404) == "unknown_blob"
    assert code_of(device.send("GET", "/v1/blobs/coordinator.db"), 404) == "unknown_blob"
    assert device.send("GET", "/v1/blobs/..%2Fcoordinator.db").status_code in (400, 404)
    private = world.stores.private_blobs.put(b"somebody's result")
    assert code_of(device.send("GET", f"/v1/blobs/{private}"), 404) == "unknown_blob"


# --- reports of scalars ---


def scalar_task(world: World) -> tuple[FakeDevice, Task]:
    """A device with a task that asks for scalars: three steps, two draws, batches of four."""
    device, *_ = world.fleet("a", "b")
    world.create_run(report="scalars", draws=2)
    world.play()
    task = device.task()
    assert task is not None
    return device, task


def scalars(**changed: Any) -> dict[str, Any]:
    """A report of two applied steps, 0 and 2; None takes a tensor away."""
    whole = {
        "scalars/jvps": np.ones((2, 2, 4), np.float32),
        "scalars/steps": np.array([0, 2], np.float32),
        "head/core": np.ones((1, 2, 2), np.float32),
    }
    return {name: array for name, array in {**whole, **changed}.items() if array is not None}


BAD_REPORTS: dict[str, dict[str, Any]] = {
    "an unknown tensor": {"s0/core": np.zeros(2, np.float32)},
    "no head": {"head/core": None},
    "numbers without their steps": {"scalars/steps": None},
    "other draws": {"scalars/jvps": np.ones((2, 3, 4), np.float32)},
    "more examples than a batch": {"scalars/jvps": np.ones((2, 2, 5), np.float32)},
    "a step too many": {"scalars/steps": np.array([0, 3], np.float32)},
    "a step twice": {"scalars/steps": np.array([1, 1], np.float32)},
    "not finite": {"scalars/jvps": np.full((2, 2, 4), np.nan, np.float32)},
}


@pytest.mark.parametrize("changed", BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
def test_bad_report_is_refused(world: World, changed: dict[str, Any]) -> None:
    """A report of scalars that is not of its task is refused, and nothing changes."""
    device, task = scalar_task(world)
    before = world.dump()
    assert code_of(device.deliver(result_with(device, task, scalars(**changed))), 422) == "bad_slices"
    assert world.dump() == before


def test_a_report_moves_what_it_says(world: World) -> None:
    """A report is counted with its bytes, and the values move by what the task's directions make of it."""
    device, task = scalar_task(world)
    values = decode_values(world.values(), SPECS)
    report = scalars()
    result = result_with(device, task, report)
    assert device.deliver(result).json() == {"status": "counted"}
    world.clock.now_s += 71
    world.play(2)
    specs = [spec for spec in SPECS if spec.name in task.slices]
    expected = values | {
        name: values[name] + change for name, change in replay(task, specs, values, report).items()
    }
    expected["head/core"] = values["head/core"] + report["head/core"]
    moved = decode_values(world.values(), SPECS)
    assert {name: array.tolist() for name, array in moved.items()} == {
        name: array.tolist() for name, array in expected.items()
    }
    assert world.run()["rounds"][0]["bytes_up_per_task"] == len(result.change)


def test_more_steps_than_asked_are_refused(world: World) -> None:
    """A result that claims more applied steps than its task has is refused: they may weigh its change."""
    device, task = open_task(world)
    assert code_of(device.deliver(device.result(task, steps_applied=4)), 422) == "too_many_steps"


CLAIMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an estimator that the package lacks": (
        {"update": "best", "draws": 4},
        {"update": "backprop"},
        "estimator_unavailable",
    ),
    "more draws than asked": (
        {"update": "best", "draws": 4},
        {"update": "forward", "draws": 5},
        "too_many_draws",
    ),
    "no draws": ({"update": "best", "draws": 4}, {"update": "forward"}, "too_many_draws"),
    "draws of exact gradients": (
        {"update": "best", "draws": 4},
        {"update": "backprop", "draws": 1},
        "too_many_draws",
    ),
    "nothing said": ({"update": "best", "draws": 4}, {}, "estimator_missing"),
    "a choice that was not left": ({"draws": 4}, {"update": "forward", "draws": 4}, "estimator_not_asked"),
}


@pytest.mark.parametrize(("run", "claim", "code"), CLAIMS.values(), ids=CLAIMS.keys())
def test_a_claimed_estimator_must_be_possible(
    world: World, run: dict[str, Any], claim: dict[str, Any], code: str
) -> None:
    """Whether a device could take an estimator decides what its result may tell; what could not be leaves no trace."""
    device, task = open_task(world, **run)
    before = world.dump()
    assert code_of(device.deliver(device.result(task, **claim)), 422) == code
    assert world.dump() == before
    honest_claim = {"update": "forward", "draws": 2} if run.get("update") else {}
    assert device.deliver(device.result(task, **honest_claim)).json() == {"status": "counted"}


def test_an_overflowing_report_weighs_nothing(world: World) -> None:
    """Numbers whose steps leave float32 are no change: the round commits by what the other devices sent."""
    world.fleet("a", "b")
    world.create_run(report="scalars", local_optimizer={"name": "sgd", "slice_rate": 1e6})
    world.play()
    for device, jvp in zip(world.devices.values(), (3e38, 1e-3), strict=True):
        task = device.task()
        assert task is not None
        report = scalars(**{"scalars/jvps": np.full((2, 1, 4), jvp, np.float32)})
        assert device.deliver(result_with(device, task, report)).json() == {"status": "counted"}
    world.play()
    assert world.run()["rounds"][0]["state"] == "committed"
    values = decode_values(world.values(), SPECS)
    assert all(np.isfinite(array).all() for array in values.values())
    assert values["head/core"].tolist() == scalars()["head/core"].tolist()
