"""A coordinator that the command line reaches without a socket, and one with a finished run."""

from __future__ import annotations

import pytest

from coordinator.admin import client
from coordinator.monitoring.readiness import Readiness
from tests.coordinator.conftest import World


@pytest.fixture
def asked(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A coordinator that the command line reaches."""

    class Straight(client.AdminClient):
        """Calls without a socket."""

        def _call(self, method: str, path: str, body: object = None) -> bytes:
            answer = world.admin(method, f"/v1/admin{path}", body)
            assert answer.status_code < 300, answer.text
            return bytes(answer.content)

        def readiness(self) -> Readiness:
            return Readiness(**world.client.get("/readyz").json())

    monkeypatch.setattr(client, "connect", lambda *_: Straight("http://x", "token"))
    return world


@pytest.fixture
def finished(asked: World) -> World:
    """The same with a finished run of two rounds."""
    devices = asked.fleet("ash", "birch", "cedar")
    asked.create_run(rounds=2)
    for _ in range(2):
        asked.work(devices)
    asked.play()
    return asked
