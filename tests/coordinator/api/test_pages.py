"""The dashboard's pages: what they show, and that they can be read by all."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from coordinator.dashboard.fleet import MOST_DEVICES
from tests.coordinator.conftest import World
from tests.coordinator.dashboard.visitor import Visitor, admin
from tests.edge_runtime.html.pages import Reader

HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture
def visitor(world: World) -> Visitor:
    """An admin at a coordinator with two runs of two rounds, devices of which one failed, a release, and a user."""
    devices = world.fleet("a", "b", "c")
    for name in ("first", "second"):
        world.create_run(name=name, rounds=2, steps=3 if name == "first" else 4)
        for _ in range(2):
            world.work(devices)
            world.play(3)
    world.create_run(name="third")
    world.admin("POST", "/v1/admin/releases", {})
    return admin(world)


def test_the_first_page_tells_what_there_is(visitor: Visitor) -> None:
    """The first page has runs with progress and curve, the fleet by class and state, memory by class."""
    page = visitor.get("/").text
    assert all(name in page for name in ("first-", "second-", "third-"))
    assert "2 of 2 rounds" in page
    assert 'data-name="devices">3<' in page
    assert "measured and" in page
    assert "<polyline" in page


def test_a_run_is_shown_with_its_rounds(world: World, visitor: Visitor) -> None:
    """A run's page has its curve, its rounds, its events, and its configuration with what each key means."""
    run_id = world.admin("GET", "/v1/admin/runs").json()[0]["run_id"]
    page = visitor.get(f"/runs/{run_id}").text
    assert "loss that devices reported" in page
    assert page.count('data-name="state"><span class="state committed">') == 2
    assert "run_created" in page
    assert "number of committed rounds after which the run has finished" in page
    assert "Abort the run" not in page
    latest = visitor.get("/runs/latest").text
    assert "Abort the run" in latest
    assert visitor.get(f"/runs/{run_id}?before=1").text.count('class="state committed"') == 1
    assert visitor.get("/runs/none").status_code == 404


def test_runs_are_compared(world: World, visitor: Visitor) -> None:
    """Two runs side by side share a drawing, and the settings in which they differ are told."""
    ids = [run["run_id"] for run in world.admin("GET", "/v1/admin/runs").json()[:2]]
    page = visitor.get(f"/compare?run={ids[0]}&run={ids[1]}").text
    assert re.search(r"<code>steps</code></th><td[^>]*><code>3</code></td><td[^>]*><code>4</code>", page)
    assert "<code>rounds</code>" not in page
    assert page.count('class="line line-1"') >= 1


def test_a_device_is_shown_with_its_history(world: World, visitor: Visitor) -> None:
    """A device's page has what it holds, its last report and its tasks, under its name as under its id."""
    page = visitor.get("/devices/a").text
    assert page == visitor.get(f"/devices/{world.devices['a'].device_id}").text
    assert "round 1" in page
    assert "100 bytes predicted" in page
    assert "class generic" in page
    assert visitor.get("/devices/nobody").status_code == 404


def test_the_fleet_is_paged_and_searched(world: World) -> None:
    """However many devices there are, a page has so many; state, class and name narrow it down."""
    with world.stores.storage.transaction() as connection:
        connection.executemany(
            "INSERT INTO devices (device_id, name, class, public_key, enrolled_s) VALUES (?, ?, ?, '', 0)",
            [(f"d-{n}", f"device-{n:04}", f"class-{n % 2}") for n in range(MOST_DEVICES * 2 + 10)],
        )
    visitor = admin(world)
    rows = [visitor.get(f"/fleet?page={page}").text.count('<th scope="row">') for page in (0, 2, 9)]
    assert rows == [MOST_DEVICES, 10, 0]
    assert "Page 1 of 3" in visitor.get("/fleet").text
    found = visitor.get("/fleet?state=never+seen&device_class=class-1&search=device-000").text
    assert found.count('<th scope="row">') == 5
    assert visitor.get("/fleet?page=-1").status_code == 400


def test_every_page_is_well_formed_and_named(world: World, visitor: Visitor) -> None:
    """Tags are closed, ids unique, headings in order, fields labelled, tables named; no script or style is inline."""
    run_id = world.run()["run_id"]
    for path in (
        *("/", "/runs", f"/runs/{run_id}", "/runs/new", "/fleet", "/devices/a", "/packages", "/releases"),
        *("/users", "/audit", f"/compare?run={run_id}", "/nothing/here", "/runs/none"),
    ):
        answer = visitor.get(path)
        if not answer.headers["content-type"].startswith("text/html"):
            assert answer.status_code == 404
            continue
        reader = _Page(answer.text)
        ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), path
        assert not [tag for tag, attributes in reader.tags if tag == "style" or "style" in attributes], path
        assert all("src" in attributes for tag, attributes in reader.tags if tag == "script"), path
        levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels)), path
        labels = {
            attributes["for"] for tag, attributes in reader.tags if tag == "label" and "for" in attributes
        }
        fields = {
            attributes.get("id")
            for tag, attributes in reader.tags
            if tag in ("input", "select") and attributes.get("type") not in ("hidden", "checkbox")
        }
        assert fields <= labels, (path, fields - labels)


class _Page(Reader):
    VOID = ("meta", "!doctype", "br", "input", "link")


def test_every_text_is_escaped(world: World) -> None:
    """What a device calls itself and reports becomes no part of a page's structure."""
    visitor = admin(world)
    with world.stores.storage.transaction() as connection:
        connection.execute(
            "INSERT INTO devices"
            " (device_id, name, class, public_key, enrolled_s, runtime_version, not_eligible, seen_s)"
            " VALUES ('d-x', ?, ?, ?, 0, ?, ?, 0)",
            (HOSTILE,) * 5,
        )
        connection.execute(
            "INSERT INTO events (at_s, device, code, message) VALUES (0, ?, 'task_failed', ?)", (HOSTILE,) * 2
        )
    for path in ("/", "/fleet", "/devices/d-x", f"/fleet?search={HOSTILE}", f"/runs/{HOSTILE}"):
        assert "<script>" not in visitor.get(path).text, path
