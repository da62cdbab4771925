"""Refusals that people see."""

from __future__ import annotations

from tests.coordinator.api.test_access import RIGHTS, Access
from tests.coordinator.conftest import World
from tests.coordinator.dashboard.visitor import Visitor, alert_of, with_role


#: A route's path with something in its place.
def _path(name: str) -> str:
    return name.split(" ", 1)[1].replace("{run_id:str}", "r").replace("{name:str}", "n")


PAGES = [
    (name, right)
    for name, right in RIGHTS.items()
    if right in (Access.VIEWER, Access.OPERATOR, Access.ADMIN) and "/v1/" not in name
]
RANK = [Access.VIEWER, Access.OPERATOR, Access.ADMIN]


def test_strangers_are_asked_to_sign_in(world: World) -> None:
    """Every page sends a stranger to sign in and back, every form too, and nothing changes."""
    world.create_run()
    before = world.dump()
    visitor = Visitor(world)
    for name, _ in PAGES:
        method, path = name.split(" ", 1)[0], _path(name)
        answer = visitor.client.request(method, path, follow_redirects=False)
        assert answer.status_code == 303, name
        assert answer.headers["location"] == f"/sign-in?next={path if method == 'GET' else '/'}"
    assert world.dump() == before


def test_a_role_without_the_right_is_told_so_and_nothing_changes(world: World) -> None:
    """Viewers and operators get one line on every page and form beyond their role, by page and by API."""
    world.create_run()
    for rank, role in ((0, "viewer"), (1, "operator")):
        visitor = with_role(world, role)
        before = world.dump()
        for name, right in PAGES:
            if RANK.index(right) <= rank:
                continue
            answer = visitor.post(_path(name)) if name.startswith("POST") else visitor.get(_path(name))
            assert answer.status_code == 403, name
            needed = "admin" if right is Access.ADMIN else "operator"
            assert alert_of(answer.text) == (
                f"some-{role} is {role}, and this needs the role {needed}; ask an admin (no_right)"
            )
        assert world.dump() == before
    acts = world.admin("GET", "/v1/admin/audit").json()
    assert ("some-viewer", "stop a run", "no_right") in [
        (act["who"], act["act"], act["outcome"]) for act in acts
    ]


def test_a_bearer_of_a_role_is_held_to_it(world: World) -> None:
    """By the API a viewer's token looks, an operator's acts, and neither keeps users."""
    run_id = world.create_run()
    for role, allowed in (("viewer", 1), ("operator", 2)):
        made = world.admin("POST", "/v1/admin/users", {"name": role, "role": role}).json()
        headers = {"Authorization": f"Bearer {made['token']}"}
        asked = [("GET", "runs"), ("POST", f"runs/{run_id}/pause"), ("GET", "users")]
        statuses = [
            world.client.request(method, f"/v1/admin/{path}", headers=headers).status_code
            for method, path in asked
        ]
        assert statuses == [200] * allowed + [403] * (3 - allowed)


def test_a_session_is_no_key_to_the_api(world: World) -> None:
    """The cookie of a session opens pages alone, so that no other site can call the API through a browser."""
    visitor = with_role(world, "admin")
    assert visitor.get("/v1/admin/runs").status_code == 401


def test_pages_forbid_all_that_is_not_theirs(world: World) -> None:
    """Every answer for people has the policy that allows no inline script and nothing from elsewhere."""
    visitor = with_role(world, "admin")
    for path in ("/", "/runs", "/runs/nothing", "/sign-in"):
        headers = visitor.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
