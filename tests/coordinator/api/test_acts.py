"""What the dashboard's forms do: runs, devices, packages, releases, users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.dashboard.run_form import KEYS, PREFIX
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import World
from tests.coordinator.dashboard.visitor import Visitor, admin, alert_of


def run_fields(world: World, **changed: str) -> dict[str, str]:
    """A form of a run that can be created."""
    config = {**world.config(), **changed}
    return {PREFIX + key: str(value) for key, value in config.items()}


def uploads(folder: Path, top: str = "package/") -> list[tuple[str, tuple[str, bytes]]]:
    """The files of a folder as a browser sends them."""
    return [("files", (top + path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


def test_a_run_is_created_paused_and_ended(world: World) -> None:
    """A run is created, paused, resumed, rolled back, released and aborted by forms, and all of it is on record."""
    visitor = admin(world)
    devices = world.fleet("a", "b")
    answer = visitor.post("/runs/new", run_fields(world, rounds="4"))
    assert answer.status_code == 303, alert_of(answer.text)
    page = answer.headers["location"]
    run_id = page.rpartition("/")[2]
    for _ in range(2):
        world.work(devices)
    assert visitor.post(f"{page}/pause").headers["location"] == page
    assert world.run()["paused"]
    visitor.post(f"{page}/resume")
    assert not world.run()["paused"]
    assert visitor.post(f"{page}/rollback", {"to": "0"}).headers["location"] == page
    assert world.run()["rounds_committed"] == 1
    assert visitor.post(f"{page}/release", {"round": "0", "lowest_accuracy": "0.5"}).status_code == 303
    (release,) = world.admin("GET", "/v1/admin/releases").json()
    assert (release["run_id"], release["round"], release["lowest_accuracy"]) == (run_id, 0, 0.5)
    visitor.post(f"{page}/stop")
    assert world.run()["state"] == "stopped"
    acts = [(act["act"], act["subject"], act["outcome"], act["detail"]) for act in _acts(world)]
    assert acts[::-1] == [
        ("sign in", "", "done", ""),
        ("create a run", "", "done", run_id),
        ("pause a run", run_id, "done", ""),
        ("resume a run", run_id, "done", ""),
        ("roll a run back", run_id, "done", "to round 0"),
        ("release a run's values", run_id, "done", "release 1, after round 0"),
        ("stop a run", run_id, "done", ""),
    ]


def _acts(world: World) -> list[dict[str, Any]]:
    """The audit log without what the test's own fleet needed."""
    return [act for act in world.admin("GET", "/v1/admin/audit").json() if "token" not in act["act"]]


def test_a_form_with_every_field_wrong_is_shown_again(world: World) -> None:
    """Every field keeps what was typed and has its own error beside it; nothing is created."""
    visitor = admin(world)
    before = world.dump()
    answer = visitor.post("/runs/new", {PREFIX + path: f"<{path}>" for path in KEYS})
    assert answer.status_code == 422
    assert alert_of(answer.text) == f"Nothing was created. {len(KEYS)} fields cannot be used: see below."
    for path in KEYS:
        key = path.replace(".", "-")
        assert f'value="&lt;{path}&gt;"' in answer.text, path
        assert f'id="f-{key}-error">{path}' in answer.text, path
    assert world.dump() == before


@pytest.mark.parametrize(
    ("changed", "beside", "says"),
    [
        ({"min_results": "3"}, "min_results", "no round could ever commit"),
        ({"package": "/nowhere"}, "package", "no folder on the coordinator's machine"),
        ({"rounds": ""}, "rounds", "this must be set"),
        ({"slices": "s9"}, "slices", "s9"),
        ({"publisher_key": generate_key().public_key}, "publisher_key", "was not made over its manifest"),
        ({"evaluation.threads": "2"}, "evaluation.data", "must be set where another key"),
    ],
)
def test_what_does_not_fit_together_stands_beside_its_field(
    world: World, changed: dict[str, str], beside: str, says: str
) -> None:
    """What only the whole configuration, or the package, can show is told beside the field that it names."""
    visitor = admin(world)
    answer = visitor.post("/runs/new", run_fields(world, **changed))
    assert answer.status_code == 422
    error = answer.text.partition(f'id="f-{beside.replace(".", "-")}-error">')[2].partition("</p>")[0]
    assert says in error.replace("&#39;", "'")
    assert world.admin("GET", "/v1/admin/runs").json() == []


def test_a_file_fills_the_form_and_creates_nothing(world: World) -> None:
    """A run.toml is shown as a form; what is no such file is told in one line."""
    visitor = admin(world)
    text = 'name = "fast"\nrounds = 3\nfeatures = [0, 2]\n[server_optimizer.slices]\nrate = 0.5\n'
    answer = visitor.post("/runs/new/file", files={"file": ("run.toml", text.encode())})
    assert 'name="run.name" value="fast"' in answer.text
    assert 'name="run.features" value="0, 2"' in answer.text
    assert 'name="run.server_optimizer.slices.rate" value="0.5"' in answer.text
    assert 'id="f-package-error">this must be set' in answer.text
    for data, says in (
        (b"\xff", "not text"),
        (b"name = ", "not TOML"),
        (b"colour = 1", "'colour'"),
    ):
        answer = visitor.post("/runs/new/file", files={"file": ("run.toml", data)})
        assert answer.status_code == 422
        assert says in alert_of(answer.text)
    assert "no file was chosen" in alert_of(visitor.post("/runs/new/file", files={"file": ("", b"")}).text)
    assert world.admin("GET", "/v1/admin/runs").json() == []


def test_a_package_is_uploaded_and_trained(world: World) -> None:
    """An uploaded package is summarised, offered to a new run, and trains like one on the machine."""
    visitor = admin(world)
    fields = {"publisher_key": world.publisher.public_key}
    for _ in range(2):  # the second time it is here already
        answer = visitor.post("/packages", fields, files=uploads(world.package))
        assert answer.status_code == 303, alert_of(answer.text)
    page = visitor.get("/packages").text
    assert page.count("New run of tiny") == 1
    assert "bert" in page
    link = page.partition("/runs/new?package=")[2].partition('"')[0]
    form = visitor.get(f"/runs/new?package={link}").text
    folder = form.partition('name="run.package" value="')[2].partition('"')[0]
    created = visitor.post("/runs/new", run_fields(world, package=folder))
    assert created.status_code == 303, alert_of(created.text)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("key", "was not signed by this publisher key; nothing was kept"),
        ("no key", "was not signed by this publisher key; nothing was kept"),
        ("bytes", "does not match the sha256"),
        ("missing", "lacks"),
        ("extra", "does not list; leave it out"),
        ("manifest", "no manifest.json"),
        ("escape", "leads out of the package"),
    ],
)
def test_a_package_that_is_not_whole_and_signed_is_not_kept(world: World, damage: str, says: str) -> None:
    """A wrong signature, other bytes, a missing or a strange file: one line, and nothing is kept."""
    visitor = admin(world)
    key = world.publisher.public_key
    files = uploads(world.package)
    match damage:
        case "key":
            key = generate_key().public_key
        case "no key":
            key = "nonsense"
        case "bytes":
            files = [
                (field, (name, data + b"x" if "programs" in name else data)) for field, (name, data) in files
            ]
        case "missing":
            files = [each for each in files if "programs" not in each[1][0]]
        case "extra":
            files.append(("files", ("package/more.bin", b"x")))
        case "manifest":
            files = [each for each in files if "manifest.json" not in each[1][0]]
        case "escape":
            files.append(("files", ("package/../../x", b"x")))
    before = sorted(path for path in (world.folder / "state").rglob("*") if "coordinator.db" not in path.name)
    answer = visitor.post("/packages", {"publisher_key": key}, files=files)
    assert answer.status_code == 422
    assert says in alert_of(answer.text)
    after = sorted(path for path in (world.folder / "state").rglob("*") if "coordinator.db" not in path.name)
    assert after == before


def test_a_device_is_revoked(world: World) -> None:
    """A device is revoked from its page, and one that nobody knows is refused in one line."""
    visitor = admin(world)
    (device,) = world.fleet("a")
    assert visitor.post(f"/devices/{device.device_id}/revoke").status_code == 303
    assert device.send("POST", "/v1/check-in", b"{}").status_code == 403
    answer = visitor.post("/devices/nobody/revoke")
    assert answer.status_code == 404
    assert "no device nobody is enrolled" in alert_of(answer.text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"round": "x"}, "is no number"),
        ({"lowest_accuracy": "2"}, "cannot be made"),
        ({"round": "7"}, "has committed no round 7"),
        ({"highest_loss": "nan"}, "cannot be made"),
    ],
)
def test_a_release_that_cannot_be_is_refused(world: World, fields: dict[str, str], says: str) -> None:
    """Limits and rounds that cannot be are refused in one line, and nothing is released."""
    visitor = admin(world)
    devices = world.fleet("a", "b")
    run_id = world.create_run()
    world.work(devices)
    answer = visitor.post(f"/runs/{run_id}/release", fields)
    assert answer.status_code in (400, 404)
    assert says in alert_of(answer.text)
    assert world.admin("GET", "/v1/admin/releases").json() == []


def test_users_are_kept_by_admins(world: World) -> None:
    """A token is shown once; a bad name, a short password, another role and a taken name change nothing."""
    visitor = admin(world)
    page = visitor.post("/users", {"name": "ann", "role": "viewer", "password": ""}).text
    token = page.partition("shown this once: <code>")[2].partition("</code>")[0]
    assert Visitor(world).sign_in(token).status_code == 303
    assert token not in visitor.get("/users").text
    before = world.dump()
    for fields, says in (
        ({"name": "ann", "role": "viewer"}, "a user ann exists"),
        ({"name": "a b", "role": "viewer"}, "a user's name has"),
        ({"name": "bob", "role": "king"}, "a role is viewer, operator, admin"),
        ({"name": "bob", "role": "viewer", "password": "short"}, "12 to 256 characters"),
        ({"name": "admin.token", "role": "viewer"}, "exists"),
    ):
        answer = visitor.post("/users", fields)
        assert answer.status_code == 422
        assert says in alert_of(answer.text)
    assert world.dump() == before
    assert visitor.post("/users/ann/remove").headers["location"] == "/users"
    assert visitor.post("/users/ann/remove").status_code == 404


def test_a_form_from_elsewhere_does_nothing(world: World) -> None:
    """A form without the session's word, or sent from another site, is refused though the cookie came with it."""
    visitor = admin(world)
    run_id = world.create_run()
    before = world.dump()
    for path in (f"/runs/{run_id}/stop", "/runs/new", "/users", "/sign-out", "/packages"):
        answer = visitor.client.post(path, data={"csrf": "x"}, follow_redirects=False)
        assert answer.status_code == 403
        assert "nothing was done" in alert_of(answer.text)
        assert visitor.post(path, headers={"Origin": "https://elsewhere.example"}).status_code == 403
    assert world.dump() == before
