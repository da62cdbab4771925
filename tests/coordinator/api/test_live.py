"""The stream that tells pages that something has happened."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator import accounts
from coordinator.api import changes, live
from coordinator.api.live import _stream
from tests.coordinator.conftest import World


def test_a_stream_tells_of_changes_and_ends_with_the_session(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page hears of what has happened, not of mere check-ins; when its session is over it hears that, and no more."""
    monkeypatch.setattr(changes, "LOOK_S", 0.0)
    monkeypatch.setattr(live, "LOOK_S", 0.0)
    monkeypatch.setattr(live, "PING_S", 0.0)
    state = world.app.state.app_state
    (device,) = world.fleet("a")
    with world.stores.storage.transaction() as connection:
        cookie = accounts.open_session(connection, "admin.token", state.admin_token, now_s=world.clock.now_s)

    async def listen() -> list[str]:
        heard: list[str] = []

        async def until(word: str) -> None:
            async for message in stream:
                if message.comment is None:
                    heard.append(str(message.event))
                if message.event == word or (word == "" and message.comment is not None):
                    return

        stream: Any = _stream(state.changes, state, cookie)
        await until("")
        await asyncio.to_thread(device.check_in)
        await until("")
        await until("")
        await asyncio.to_thread(world.create_run)
        await until("changed")
        with world.stores.storage.transaction() as connection:
            accounts.end_session(connection, cookie)
        await until("ended")
        assert [message async for message in stream] == []
        return heard

    assert asyncio.run(listen()) == ["changed", "ended"]
    assert state.changes.streams == 0


def test_streams_are_bounded(world: World) -> None:
    """One page more than there may be is told to close some."""
    from tests.coordinator.dashboard.visitor import admin

    visitor = admin(world)
    world.app.state.app_state.changes.streams = live.MOST_STREAMS
    assert visitor.get("/live").status_code == 503
