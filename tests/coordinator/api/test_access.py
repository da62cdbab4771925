"""Who may call what: decided once, for every route, on what the router saw."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from litestar import get, post

from coordinator.api.access import Access, stated_access
from coordinator.api.app import create_app
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import CheckInRequest, Refusal
from tests.coordinator.api.raw import raw_request
from tests.coordinator.conftest import FakeDevice, World

CHECK_IN = messages.encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))

#: Every route and who may call it. A new route needs a line here.
RIGHTS = {
    "GET /healthz": Access.ANYBODY,
    "GET /readyz": Access.ANYBODY,
    "GET /metrics": Access.MONITOR,
    "GET /schema": Access.ANYBODY,
    "GET /schema/openapi.json": Access.ANYBODY,
    "GET /schema/{path:str}": Access.ANYBODY,
    "POST /v1/devices/enrol": Access.TOKEN_HOLDER,
    "POST /v1/check-in": Access.DEVICE,
    "PUT /v1/tasks/{task_id:str}/result": Access.DEVICE,
    "GET /v1/tasks/{task_id:str}/upload/{sha256:str}": Access.DEVICE,
    "PUT /v1/tasks/{task_id:str}/upload/{sha256:str}/{offset:int}": Access.DEVICE,
    "POST /v1/tasks/{task_id:str}/upload/{sha256:str}": Access.DEVICE,
    "POST /v1/tasks/{task_id:str}/alive": Access.DEVICE,
    "GET /v1/tasks/{task_id:str}/masking": Access.DEVICE,
    "PUT /v1/tasks/{task_id:str}/masking/shares": Access.DEVICE,
    "PUT /v1/tasks/{task_id:str}/masking/vector": Access.DEVICE,
    "PUT /v1/tasks/{task_id:str}/masking/reveal": Access.DEVICE,
    "POST /v1/events": Access.DEVICE,
    "GET /v1/blobs/{sha256:str}": Access.DEVICE,
    "POST /v1/admin/tokens": Access.OPERATOR,
    "GET /v1/admin/devices": Access.VIEWER,
    "POST /v1/admin/devices/{name:str}/revoke": Access.OPERATOR,
    "POST /v1/admin/devices/{name:str}/resume": Access.OPERATOR,
    "GET /v1/admin/releases": Access.VIEWER,
    "POST /v1/admin/releases": Access.OPERATOR,
    "GET /v1/admin/runs": Access.VIEWER,
    "POST /v1/admin/runs": Access.OPERATOR,
    "GET /v1/admin/runs/{run_id:str}": Access.VIEWER,
    "GET /v1/admin/runs/{run_id:str}/events": Access.VIEWER,
    "GET /v1/admin/runs/{run_id:str}/slices": Access.VIEWER,
    "POST /v1/admin/runs/{run_id:str}/stop": Access.OPERATOR,
    "POST /v1/admin/runs/{run_id:str}/pause": Access.OPERATOR,
    "POST /v1/admin/runs/{run_id:str}/resume": Access.OPERATOR,
    "POST /v1/admin/runs/{run_id:str}/rollback": Access.OPERATOR,
    "GET /v1/admin/users": Access.ADMIN,
    "POST /v1/admin/users": Access.ADMIN,
    "POST /v1/admin/users/{name:str}/remove": Access.ADMIN,
    "GET /v1/admin/audit": Access.ADMIN,
    "GET /static/{name:str}": Access.ANYBODY,
    "GET /sign-in": Access.SIGNING_IN,
    "POST /sign-in": Access.SIGNING_IN,
    "POST /sign-out": Access.VIEWER,
    "GET /": Access.VIEWER,
    "GET /live": Access.VIEWER,
    "GET /runs": Access.VIEWER,
    "GET /runs/{run_id:str}": Access.VIEWER,
    "GET /compare": Access.VIEWER,
    "GET /fleet": Access.VIEWER,
    "GET /devices/{name:str}": Access.VIEWER,
    "GET /packages": Access.VIEWER,
    "GET /releases": Access.VIEWER,
    "GET /runs/new": Access.OPERATOR,
    "POST /runs/new": Access.OPERATOR,
    "POST /runs/new/file": Access.OPERATOR,
    "POST /runs/{run_id:str}/pause": Access.OPERATOR,
    "POST /runs/{run_id:str}/resume": Access.OPERATOR,
    "POST /runs/{run_id:str}/stop": Access.OPERATOR,
    "POST /runs/{run_id:str}/rollback": Access.OPERATOR,
    "POST /runs/{run_id:str}/release": Access.OPERATOR,
    "POST /devices/{name:str}/revoke": Access.OPERATOR,
    "POST /devices/{name:str}/resume": Access.OPERATOR,
    "POST /packages": Access.OPERATOR,
    "GET /users": Access.ADMIN,
    "POST /users": Access.ADMIN,
    "POST /users/{name:str}/remove": Access.ADMIN,
    "GET /audit": Access.ADMIN,
}


def code_of(answer: Any, status: int) -> str:
    """The code of a refusal, after checking its status and form."""
    assert answer.status_code == status, answer.text
    return messages.decode(answer.content, Refusal).code


@pytest.fixture
def blob(world: World) -> tuple[FakeDevice, str, bytes]:
    """A device, the digest of a package file, and its bytes."""
    (device,) = world.fleet("a")
    world.create_run()
    data = (world.package / "programs.onnx").read_bytes()
    return device, hashlib.sha256(data).hexdigest(), data


def test_every_route_states_who_may_call_it(world: World) -> None:
    """The table has every route that is served, the documents' own ones too; OPTIONS is as its path is."""
    found = stated_access(world.app)
    assert {name: right for name, right in found.items() if not name.startswith("OPTIONS ")} == RIGHTS
    for name, right in found.items():
        method, path = name.split(" ", 1)
        if method == "OPTIONS":
            stated = {RIGHTS.get(f"{other} {path}") for other in ("GET", "POST", "PUT")}
            assert right in stated or (right is Access.OPERATOR and path.startswith("/v1/admin/"))


@pytest.mark.parametrize("method", [get, post], ids=["get", "post"])
def test_a_route_without_a_right_does_not_start(
    world: World, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """A route that says of nobody that it may call it stops the coordinator at its start, and is named."""

    @method("/v1/forgotten", sync_to_thread=False)
    def forgotten() -> None:
        """Serve whoever asks."""

    world.stores.storage.close()
    monkeypatch.setattr("coordinator.api.app.ROUTERS", (forgotten,))
    with pytest.raises(LookupError, match="/v1/forgotten"):
        create_app(world.folder / "state")


#: Ways to write the address of a blob. Whatever a router or a proxy makes of one, nobody gets bytes unasked.
SPELLINGS = (
    "/v1/blobs/{}",
    "//v1/blobs/{}",
    "///v1//blobs///{}",
    "/v1/blobs/{}/",
    "/./v1/blobs/{}",
    "/v1/./blobs/{}",
    "/x/../v1/blobs/{}",
    "/v1%2fblobs%2f{}",
    "/v1/blobs%2F{}",
    "/%2fv1/blobs/{}",
    "/%76%31/blobs/{}",
    "/v1/blobs/%2e/{}",
    "/V1/Blobs/{}",
    "/v1/blobs/{}?x=/v1/admin/",
    "/v1/blobs/{}#/healthz",
    "/healthz/../v1/blobs/{}",
    "/healthz//v1/blobs/{}",
    "/schema/../v1/blobs/{}",
    "/v1/admin/../blobs/{}",
    "/v1/devices/enrol/../../blobs/{}",
    "\\v1\\blobs\\{}",
    "/v1/blobs;x/{}",
)


def raw_get(world: World, target: str, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    """Status and body of the answer to a request whose target is sent as it is spelt."""
    answer = raw_request(world, method, target, headers or {})
    return answer.status_code, answer.content


def test_no_spelling_of_a_blob_serves_strangers(blob: tuple[FakeDevice, str, bytes], world: World) -> None:
    """However a blob's address is written and asked for, nobody unsigned and nobody revoked gets its bytes."""
    device, sha256, data = blob
    asked = [
        (method, spelling.format(sha256))
        for method in ("GET", "HEAD", "OPTIONS", "POST", "TRACE")
        for spelling in SPELLINGS
    ]
    for method, target in asked:
        status, body = raw_get(world, target, method)
        assert status in {400, 401, 404, 405}, (method, target)
        assert data[:20] not in body
    world.admin("POST", "/v1/admin/devices/a/revoke")
    for method, target in asked:
        signed_path = target.partition("?")[0].replace("\\", "/")
        status, body = raw_get(world, target, method, device.headers(method, signed_path, b""))
        assert status in {400, 403, 404, 405}, (method, target)
        assert data[:20] not in body


@pytest.mark.parametrize(
    "target",
    [
        "/v1/admin/runs",
        "//v1/admin/runs",
        "/v1//admin/runs",
        "/v1%2fadmin%2fruns",
        "/v1/admin/runs/",
        "/v1/check-in/../admin/runs",
    ],
)
def test_no_spelling_of_an_admin_route_serves_strangers(world: World, target: str) -> None:
    """However an operator's route is written, it takes the operator's token, and a device's signature is none."""
    (device,) = world.fleet("a")
    for headers in ({}, device.headers("GET", target, b""), {"Authorization": "Bearer x"}):
        status, _ = raw_get(world, target, headers=headers)
        assert status in {401, 404}


def test_an_odd_spelling_serves_its_signer(blob: tuple[FakeDevice, str, bytes], world: World) -> None:
    """A device that signed an address as it was sent gets what the router finds there."""
    device, sha256, data = blob
    target = f"//v1/blobs/{sha256}"
    assert raw_get(world, target, headers=device.headers("GET", target, b"")) == (200, data)
    other = f"/v1/blobs/{sha256}"
    assert raw_get(world, target, headers=device.headers("GET", other, b""))[0] == 401


def test_revoked_gets_nothing(world: World) -> None:
    """A revoked device is refused on every device route, whatever it sends."""
    (device,) = world.fleet("a")
    world.admin("POST", "/v1/admin/devices/a/revoke")
    before = world.dump()
    for name, right in RIGHTS.items():
        method, path = name.split(" ", 1)
        if right is Access.DEVICE:
            path = path.replace("{task_id:str}", "t").replace("{sha256:str}", "0" * 64)
            path = path.replace("{offset:int}", "0")
            body = b"" if "/alive" in path or "/upload/" in path else CHECK_IN
            assert code_of(device.send(method, path, body), 403) == "revoked"
    assert world.dump() == before
