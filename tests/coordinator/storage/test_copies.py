"""Backup, restore and the move to servers, by the command line, on real databases and a real bucket."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.storage import copies, device_rows
from coordinator.storage.stores import Places, open_stores
from edge_runtime.folder_lock import claim_folder
from tests.coordinator.conftest import World
from tests.coordinator.storage.servers import (
    BUCKET,
    CREDENTIALS,
    needs_postgres,
    shared_postgres,
    shared_s3,
)

#: Tables whose rows a copy has to the bit.
TABLES = (
    *("devices", "tokens", "runs", "rounds", "slots", "tasks"),
    *("results", "evaluations", "events", "checkpoints"),
)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 server's keys in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[World]:
    """A coordinator in the middle of a run: one round is committed, of the next one result is in."""
    (tmp_path / "first").mkdir()
    world = World(tmp_path / "first")
    devices = world.fleet("a", "b", "c")
    world.create_run(rounds=2, seed=5)
    world.work(devices)
    world.play()
    for device in devices:
        task = device.task()
        if task is not None:
            assert device.deliver(device.result(task)).json() == {"status": "counted"}
            break
    yield world
    world.stores.storage.close()


def rows(folder: Path, places: Places | None = None) -> dict[str, list[str]]:
    """All rows of a state, by table, in any database's words."""
    stores = open_stores(folder, places=places)
    with stores.storage.reading() as connection:
        found = {
            table: sorted(repr(tuple(row)) for row in connection.execute(f"SELECT * FROM {table}"))  # noqa: S608
            for table in TABLES
        }
    stores.storage.close()
    return found


def finish(world: World) -> bytes:
    """Play a run to its end; its values."""
    while world.run()["state"] not in ("finished", "failed"):
        world.work(list(world.devices.values()))
    assert world.run()["state"] == "finished"
    return world.values()


def go_on(world: World, folder: Path, places: Places | None = None) -> bytes:
    """Play the run of a coordinator to its end on a copy of its state; the values."""
    other = object.__new__(World)
    other.__dict__.update(world.__dict__)
    other.places = places
    other.folder = folder.parent
    assert folder.name == "state"
    for device in other.devices.values():
        device.world = other
    other.start()
    values = finish(other)
    other.stores.storage.close()
    for device in world.devices.values():
        device.world = world
    return values


def test_a_backup_of_a_living_coordinator_is_a_state_folder(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backup in mid-round, restored into a new folder, has all rows and ends the run in the bits of the original; a
    request that was signed before is refused there, and a second restore over it too."""
    state, copy = trained.folder / "state", tmp_path / "backup"
    assert main(["backup", "--state", str(state), "--output", str(copy)]) == 0
    assert "keep it as secret" in capsys.readouterr().out
    assert (copy / "task.key").stat().st_mode & 0o777 == 0o600
    new = tmp_path / "second" / "state"
    new.parent.mkdir()
    assert main(["restore", str(copy), "--state", str(new)]) == 0
    assert rows(new) == rows(state)
    stores = open_stores(new)
    with stores.storage.reading() as connection:
        assert device_rows.nonces_forgotten_to_s(connection) > trained.clock.now_s
    stores.storage.close()
    before = rows(new)
    capsys.readouterr()
    assert main(["restore", str(copy), "--state", str(new)]) == 11
    error = capsys.readouterr().err
    assert "holds a coordinator's state already; restore into a new folder" in error
    assert error.count("\n") == 1
    assert main(["backup", "--state", str(state), "--output", str(copy)]) == 11
    assert "is not empty; give --output a new folder" in capsys.readouterr().err
    assert rows(new) == before
    with sqlite3.connect(
        new / "coordinator.db"
    ) as connection:  # so that the test's own clock, which stands, goes on
        connection.execute("DELETE FROM marks")
    assert go_on(trained, new) == finish(trained)


@needs_postgres
def test_a_state_folder_moves_to_servers_and_back(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run moves in mid-round from a folder to PostgreSQL and S3, and by backup and restore to a second database and
    to a folder again; wherever it goes on, it ends in the same bits, with its numbers going on."""
    state = trained.folder / "state"
    moved = tmp_path / "moved" / "state"
    shutil.copytree(state, moved)
    expected = rows(state)
    bucket = f"s3://{BUCKET}/{tmp_path.name}?endpoint={shared_s3()}"
    first = Places(shared_postgres().fresh("moved"), bucket)
    where = ["--database", str(first.database), "--blobs", bucket]
    with claim_folder(moved / "lock", what="x", who="y"):
        assert main(["migrate", "--state", str(moved), *where]) == 11
    assert "another edge-coordinator uses the state folder" in capsys.readouterr().err
    assert main(["migrate", "--state", str(moved), *where]) == 0
    assert (moved / copies.MOVED).exists()
    assert not (moved / "coordinator.db").exists()
    assert rows(moved, first) == expected
    # It goes nowhere twice, nor over what lives there.
    capsys.readouterr()
    assert main(["migrate", "--state", str(moved), *where]) == 11
    assert "there is no coordinator.db in it" in capsys.readouterr().err
    copy = tmp_path / "backup"
    assert main(["backup", "--state", str(moved), *where, "--output", str(copy)]) == 0
    assert main(["restore", str(copy), "--state", str(tmp_path / "x"), *where]) == 11
    assert "--database holds a coordinator's state already; create a new database" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    # A second database, with its secrets in a folder of their own, and a folder.
    second = Places(shared_postgres().fresh("restored"), None, tmp_path / "secrets")
    new = tmp_path / "server" / "state"
    new.parent.mkdir()
    words = ["--database", str(second.database), "--secrets", str(second.secrets)]
    assert main(["restore", str(copy), "--state", str(new), *words]) == 0
    assert rows(new, second) == expected
    back = tmp_path / "back" / "state"
    back.parent.mkdir()
    assert main(["restore", str(copy), "--state", str(back)]) == 0
    assert rows(back) == expected
    with sqlite3.connect(back / "coordinator.db") as connection:
        connection.execute("DELETE FROM marks")
    values = go_on(trained, moved, first)
    assert values == go_on(trained, back) == finish(trained)


@needs_postgres
def test_secrets_may_lie_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that moves to a database leaves its secrets where it is told, and a backup finds them there."""
    state, secrets, copy = tmp_path / "state", tmp_path / "secrets", tmp_path / "copy"
    open_stores(state).storage.close()
    (state / "admin.token").write_text("t\n")
    where = ["--state", str(state), "--database", shared_postgres().fresh("elsewhere")]
    assert main(["migrate", *where, "--secrets", str(secrets)]) == 0
    (state / "task.key").unlink()
    assert main(["backup", *where, "--output", str(copy)]) == 11
    assert "there is no task.key in it" in capsys.readouterr().err
    assert main(["backup", *where, "--secrets", str(secrets), "--output", str(copy)]) == 0
    assert (copy / "task.key").read_bytes() == (secrets / "task.key").read_bytes()


def test_what_is_no_backup_is_refused(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without a state, a backup of a newer version, one of an earlier, and one without its key are each
    refused in one line, and nothing is written."""
    copy, new = tmp_path / "backup", tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert main(["backup", "--state", str(trained.folder / "state"), "--output", str(copy)]) == 0

    def refused(source: Path, words: str) -> None:
        capsys.readouterr()
        assert main(["restore", str(source), "--state", str(new)]) == 11
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not new.exists()

    refused(tmp_path / "empty", "there is no coordinator.db in it")
    with sqlite3.connect(copy / "coordinator.db") as connection:
        connection.execute("INSERT INTO migrations VALUES ('from_the_future', 0)")
    refused(copy, "was written by a newer coordinator (migration from_the_future); upgrade this one")
    with sqlite3.connect(copy / "coordinator.db") as connection:
        connection.execute(
            "DELETE FROM migrations WHERE name IN ('from_the_future', 'share_between_processes')"
        )
    refused(copy, "was written by an earlier coordinator; use that one's command")
    (copy / "task.key").unlink()
    refused(copy, "there is no task.key in it")
    assert main(["migrate", "--state", str(trained.folder / "state")]) == 11
    assert "say where to: --database" in capsys.readouterr().err
