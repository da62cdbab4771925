"""Somebody at the dashboard, without a browser: signs in, and sends the forms that pages have."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from tests.coordinator.conftest import World

_CSRF = re.compile(r'name="csrf" value="([^"]+)"')


class Visitor:
    """A session of the dashboard; each has cookies of its own.

    Args:
        world: coordinator.
    """

    def __init__(self, world: World) -> None:
        from litestar.testing import TestClient

        self.world = world
        self.client = TestClient(world.app, raise_server_exceptions=True)  # type: ignore[arg-type]
        self.csrf = ""

    def sign_in(self, secret: str | None = None, name: str = "", target: str = "/") -> Any:
        """Sign in with a password or a token; by default with that of the state folder."""
        given = self.world.app.state.app_state.admin_token if secret is None else secret
        word = self.word_of(self.client.get("/sign-in").text)
        fields = {"csrf": word, "name": name, "secret": given, "next": target}
        answer = self.client.post("/sign-in", data=fields, follow_redirects=False)
        if answer.status_code == 303:
            self.csrf = self.word_of(self.get("/").text)
        return answer

    def get(self, path: str) -> Any:
        """A page; where it sends to another, that is not followed."""
        return self.client.get(path, follow_redirects=False)

    def post(self, path: str, fields: dict[str, str] | None = None, **more: Any) -> Any:
        """Send a form of the session."""
        data = {"csrf": self.csrf, **(fields or {})}
        return self.client.post(path, data=data, follow_redirects=False, **more)

    @staticmethod
    def word_of(page: str) -> str:
        """The word that the forms of a page carry."""
        found = _CSRF.search(page)
        assert found is not None, page[:500]
        return found[1]


def admin(world: World) -> Visitor:
    """A visitor who may do everything."""
    visitor = Visitor(world)
    assert visitor.sign_in().status_code == 303
    return visitor


def with_role(world: World, role: str) -> Visitor:
    """A visitor with a token of this role."""
    made = world.admin("POST", "/v1/admin/users", {"name": f"some-{role}", "role": role}).json()
    visitor = Visitor(world)
    assert visitor.sign_in(made["token"]).status_code == 303
    return visitor


def alert_of(page: str) -> str:
    """What a page says was not done, in one line."""
    found = re.search(r'role="alert">(.*?)</(?:div|p)>', page, re.S)
    assert found is not None, page[-1500:]
    return " ".join(unescape(re.sub("<[^>]*>", "", found[1])).split())
