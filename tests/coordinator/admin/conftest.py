"""A finished run, and the command line that reaches its coordinator without a socket."""

from __future__ import annotations

import pytest

from coordinator.admin import client
from tests.coordinator.conftest import World


@pytest.fixture
def finished(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A coordinator with a finished run of two rounds, which the command line reaches."""
    devices = world.fleet("ash", "birch", "cedar")
    world.create_run(rounds=2)
    for _ in range(2):
        world.work(devices)
    world.play()

    class Straight(client.AdminClient):
        """Calls without a socket."""

        def _call(self, method: str, path: str, body: object = None, **_: object) -> bytes:
            answer = world.admin(method, f"/v1/admin{path}", body)
            assert answer.status_code < 300, answer.text
            return bytes(answer.content)

    monkeypatch.setattr(client, "connect", lambda *_: Straight("http://x", "token"))
    return world
