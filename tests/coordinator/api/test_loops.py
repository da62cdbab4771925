"""Trouble of the coordinator's machine that passes: nothing is taken for damage, nothing is lost, and it goes on."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coordinator.api import app as application
from coordinator.api import loops
from coordinator.api.app_state import AppState
from coordinator.storage.database import Storage
from coordinator.storage.stores import open_stores
from edge_runtime.errors import ConfigError, ResourceError
from edge_runtime.protocol import messages
from edge_runtime.protocol.messages import Refusal
from tests.coordinator.conftest import World


def lock_held_elsewhere(world: World) -> sqlite3.Connection:
    """Another process's connection that holds the database locked, which ours waits for only briefly."""
    world.stores.storage._connection.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(world.folder / "state/coordinator.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


def fill_disk(world: World) -> Callable[[], None]:
    """Let the database grow no further, as on a full disk; returns what makes room again."""
    connection = world.stores.storage._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    return lambda: connection.execute("PRAGMA max_page_count = 1000000") and None


def trouble_told(answer: Any) -> None:
    """The answer is 503 in the protocol's own form, and says when to come again."""
    assert answer.status_code == 503, answer.text
    assert messages.decode(answer.content, Refusal).code == "trouble"
    assert int(answer.headers["retry-after"]) > 0


def play_for(app_state: AppState, seconds: float = 0.3) -> None:
    """The loop that plays the rounds, for a moment; it must not end by itself."""

    async def run() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await loops.for_ever("rounds", lambda: application.play_rounds(app_state))

    asyncio.run(run())


@pytest.fixture
def working(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two devices with a task each; attempts come quickly."""
    monkeypatch.setattr(loops, "FIRST_PAUSE_S", 0.02)
    world.fleet("a", "b")
    world.create_run(rounds=1)
    world.play()
    return world


def deliver_all(world: World) -> list[Any]:
    """The answers to both devices' results."""
    tasks = [(device, device.task()) for device in world.devices.values()]
    return [device.deliver(device.result(task)) for device, task in tasks if task is not None]


def test_a_locked_database_is_waited_out(working: World) -> None:
    """While another process holds the database locked, requests are told to come again and the loop waits."""
    device = working.devices["a"]
    task = device.task()
    assert task is not None
    other = lock_held_elsewhere(working)
    trouble_told(device.deliver(device.result(task)))
    play_for(working.app.state.app_state)
    other.execute("ROLLBACK")
    other.close()
    assert [answer.json()["status"] for answer in deliver_all(working)] == ["counted", "counted"]
    play_for(working.app.state.app_state)
    assert working.run()["state"] == "finished"


def test_a_full_database_is_waited_out(working: World) -> None:
    """While the database cannot grow, what would write is refused whole; with room the run goes on where it stood."""
    device = working.devices["a"]
    token = working.admin("POST", "/v1/admin/tokens", {}).json()["token"]
    before = working.dump()
    make_room = fill_disk(working)
    answers = [
        device.send("POST", "/v1/events", messages.encode(messages.DeviceEvent("hot", "x" * 2000)))
        for _ in range(12)
    ]
    refused = [answer for answer in answers if answer.status_code != 204]
    assert refused
    for answer in refused:
        trouble_told(answer)
    make_room()
    assert len(working.dump()) == len(before) + len(answers) - len(refused)
    assert token
    assert [answer.json()["status"] for answer in deliver_all(working)] == ["counted", "counted"]
    play_for(working.app.state.app_state)
    assert working.run()["state"] == "finished"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EIO, errno.ENOMEM])
def test_what_the_machine_lacks_is_no_damage(
    working: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file that cannot be read or written for now fails no run: results wait, and the round is committed later."""
    deliver_all(working)

    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    for where, name in ((Path, "read_bytes"), (os, "open"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            play_for(working.app.state.app_state, 0.1)
        assert working.run()["state"] == "running"
    play_for(working.app.state.app_state)
    assert working.run()["state"] == "finished"


def test_a_missing_blob_is_damage(working: World) -> None:
    """A file that is gone is waited for in vain: the run fails and says which."""
    deliver_all(working)
    for path in (working.folder / "state/private").rglob("*/*"):
        path.unlink()
    play_for(working.app.state.app_state)
    assert (working.run()["state"], "missing" in working.run()["reason"]) == ("failed", True)


def test_a_body_that_finds_no_room_may_come_again(working: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that the disk has no room for on its way is refused with 503; the same result counts later."""
    device = working.devices["a"]
    task = device.task()
    assert task is not None

    def fail(*_: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("coordinator.api.body.Body.add", fail)
        answer = device.deliver(device.result(task))
    trouble_told(answer)
    assert answer.headers["connection"] == "close"
    assert device.deliver(device.result(task)).json() == {"status": "counted"}


def test_work_that_waits_shares_a_transaction(world: World) -> None:
    """Of many pieces of work that wait, one that raises takes nothing of the others with it."""
    world.fleet("a")
    app_state = world.app.state.app_state

    def insert(connection: sqlite3.Connection, code: str) -> str:
        connection.execute("INSERT INTO events (at_s, code, message) VALUES (0, ?, '')", (code,))
        if code == "bad":
            raise ValueError(code)
        return code

    async def run() -> list[Any]:
        work = [
            app_state.write(lambda connection, code=code: insert(connection, code))
            for code in ("x1", "bad", "x2", "bad", "x3")
        ]
        return await asyncio.gather(*work, return_exceptions=True)

    ends = asyncio.run(run())
    assert [end if isinstance(end, str) else type(end) for end in ends] == [
        "x1", ValueError, "x2", ValueError, "x3",
    ]  # fmt: skip
    with world.stores.storage.reading() as connection:
        codes = [row[0] for row in connection.execute("SELECT code FROM events WHERE at_s = 0")]
    assert codes == ["x1", "x2", "x3"]


def test_a_commit_that_fails_leaves_no_transaction_open(tmp_path: Path) -> None:
    """After a transaction that could not be ended the next one begins: nothing of the first is in it."""
    storage = Storage(tmp_path / "a.db")
    with pytest.raises(sqlite3.IntegrityError), storage.transaction() as connection:
        connection.execute("PRAGMA defer_foreign_keys = ON")
        connection.execute("INSERT INTO nonces VALUES ('nobody', 'n', 0)")  # found out when it is committed
    with storage.transaction() as connection:
        assert connection.execute("SELECT count(*) FROM nonces").fetchone()[0] == 0


def test_a_start_in_trouble_says_that_waiting_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder that cannot be opened for now ends a start with a code of its own; a wrong one with another."""

    def fail(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", fail)
        with pytest.raises(ResourceError, match="no space left"):
            open_stores(tmp_path / "state")
    open_stores(tmp_path / "state").storage.close()
    (tmp_path / "state/coordinator.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError):
        open_stores(tmp_path / "state")
