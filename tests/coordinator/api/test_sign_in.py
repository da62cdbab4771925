"""Signing in and out, and how far a stranger gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.api.attempts import FREE
from tests.coordinator.conftest import World
from tests.coordinator.dashboard.visitor import Visitor, admin, alert_of

PASSWORD = "a password that is long"


def add_user(world: World, name: str, role: str, password: str | None = PASSWORD) -> None:
    """Add a user by the admin API."""
    answer = world.admin("POST", "/v1/admin/users", {"name": name, "role": role, "password": password})
    assert answer.status_code == 201, answer.text


def test_password_and_token_open_a_session_that_can_be_ended(world: World) -> None:
    """Both open a session whose cookie no script reads and no other site sends; signing out ends it on the server."""
    add_user(world, "ann", "viewer")
    for name, secret in (("ann", PASSWORD), ("", None)):
        visitor = Visitor(world)
        answer = visitor.sign_in(secret, name, target="/fleet")
        assert answer.headers["location"] == "/fleet"
        cookie = next(each for each in answer.headers.get_list("set-cookie") if "edge_session" in each)
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert visitor.get("/").status_code == 200
        kept = dict(visitor.client.cookies)
        assert visitor.post("/sign-out").headers["location"] == "/sign-in"
        visitor.client.cookies.update(kept)
        assert visitor.get("/").headers["location"].startswith("/sign-in")


def test_the_cookie_is_for_tls_alone_where_there_is_tls(world: World) -> None:
    """Over TLS the session's cookie is never sent without it."""
    visitor = Visitor(world)
    visitor.client.base_url = "https://testserver.local"  # type: ignore[assignment]
    answer = visitor.sign_in()
    assert all("Secure" in cookie for cookie in answer.headers.get_list("set-cookie"))


def test_guesses_are_bounded_and_a_token_still_serves(world: World) -> None:
    """After some wrong passwords a name pauses, known or not, in the same words; a token serves all the same."""
    add_user(world, "ann", "admin")
    said = {}
    for name in ("ann", "nobody"):
        visitor = Visitor(world)
        for _ in range(FREE):
            answer = visitor.sign_in("wrong", name)
            assert answer.status_code == 401
        said[name] = (alert_of(answer.text), alert_of(visitor.sign_in(PASSWORD, name).text))
        assert visitor.sign_in(PASSWORD, name).status_code == 429
    assert said["ann"] == said["nobody"]
    assert "sign in with a token and an empty name" in said["ann"][1]
    assert Visitor(world).sign_in().status_code == 303
    world.clock.now_s += 3
    assert Visitor(world).sign_in(PASSWORD, "ann").status_code == 303
    acts = [
        (act["who"], act["subject"], act["outcome"]) for act in world.admin("GET", "/v1/admin/audit").json()
    ]
    assert acts.count(("", "ann", "wrong_secret")) == FREE
    assert ("", "ann", "too_often") in acts
    assert ("ann", "", "done") in acts


@pytest.mark.parametrize("secret", ["", "x" * 10_000, "\udce4"])
def test_odd_secrets_are_wrong_and_nothing_else(world: World, secret: str) -> None:
    """An empty, a huge and an unprintable secret are answered like any wrong one."""
    assert Visitor(world).sign_in(secret.encode("utf-8", "replace").decode()).status_code == 401


def test_a_removed_user_is_out_at_once(world: World) -> None:
    """Removing a user ends its sessions and its token."""
    token = world.admin("POST", "/v1/admin/users", {"name": "ann", "role": "viewer"}).json()["token"]
    visitor = Visitor(world)
    visitor.sign_in(token)
    assert visitor.get("/runs").status_code == 200
    assert world.admin("POST", "/v1/admin/users/ann/remove").json() == {"name": "ann"}
    assert visitor.get("/runs").status_code == 303
    headers = {"Authorization": f"Bearer {token}"}
    assert world.client.get("/v1/admin/runs", headers=headers).status_code == 401


def test_nobody_is_sent_elsewhere(world: World) -> None:
    """Whatever the address of the form says, one goes on to a page of ours."""
    for target in ("https://elsewhere.example", "//elsewhere.example", "/\\elsewhere.example", "x", "/\n/a"):
        assert Visitor(world).sign_in(target=target).headers["location"] == "/"


def test_no_token_is_kept(world: World, tmp_path: Path) -> None:
    """Neither the cookie of a session nor a user's token stands in the database."""
    visitor = admin(world)
    dump = "\n".join(world.stores.storage.dump())
    assert visitor.client.cookies["edge_session"] not in dump
    assert world.app.state.app_state.admin_token not in dump
    del tmp_path
