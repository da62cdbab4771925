"""What is PostgreSQL's own: its tables beside SQLite's, its migrations, and a run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.storage import (
    audit_rows,
    fleet_rows,
    migrations,
    monitor_rows,
    release_rows,
    result_rows,
    round_rows,
    run_rows,
    task_rows,
    token_rows,
    user_rows,
)
from coordinator.storage.connection import Connection
from coordinator.storage.database import Storage
from coordinator.storage.postgres import PostgresStorage
from coordinator.storage.stores import Places
from edge_runtime.errors import ConfigError
from tests.coordinator.conftest import SPECS, World
from tests.coordinator.storage.servers import (
    BUCKET,
    CREDENTIALS,
    PostgresServer,
    needs_postgres,
    shared_postgres,
    shared_s3,
)


@pytest.fixture
def server() -> PostgresServer:
    """A PostgreSQL server."""
    return shared_postgres()


@pytest.fixture
def endpoint() -> str:
    """Address of an S3 server."""
    return shared_s3()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 server's keys in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@needs_postgres
def test_both_databases_have_the_same_tables(server: PostgresServer, tmp_path: Path) -> None:
    """PostgreSQL's tables have the columns, types, keys and conditions of SQLite's, for they are made by one text."""
    lite, server_side = Storage(tmp_path / "db"), PostgresStorage(server.fresh("schema"))
    kinds = {"BIGINT": "INTEGER", "DOUBLE PRECISION": "REAL", "TEXT": "TEXT", "BYTEA": "BLOB"}
    with lite.reading() as one, server_side.reading() as two:
        names = [
            str(row[0])
            for row in one.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name"
            )
        ]
        assert server_side.tables(two) == names
        for name in names:
            ours = [
                (row["name"], row["type"], bool(row["notnull"] or row["pk"]), bool(row["pk"]))
                for row in one.execute(f"PRAGMA table_info({name})")
            ]
            theirs = [
                (row[0], kinds[row[1].upper()], row[2] == "NO", row[3])
                for row in two.execute(
                    "SELECT column_name, data_type, is_nullable, EXISTS (SELECT 1 FROM pg_index JOIN pg_attribute"
                    " ON attrelid = indrelid AND attnum = ANY (indkey) WHERE indisprimary"
                    " AND indrelid = table_name::regclass AND attname = column_name)"
                    " FROM information_schema.columns WHERE table_name = ? ORDER BY ordinal_position",
                    (name,),
                )
            ]
            assert theirs == ours, name
            links = {row["table"] for row in one.execute(f"PRAGMA foreign_key_list({name})")}
            linked = two.execute(
                "SELECT confrelid::regclass::text FROM pg_constraint WHERE contype = 'f' AND conrelid = ?::regclass",
                (name,),
            )
            assert {row[0] for row in linked} == links, name
        indexes = {
            str(row[0])
            for row in one.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
        }
        made = {
            str(row[0]) for row in two.execute("SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")
        }
        assert indexes <= made
    lite.close()
    server_side.close()


@needs_postgres
def test_a_database_of_a_newer_version_is_refused(server: PostgresServer) -> None:
    """A database with a migration this program does not know is refused with advice, and unchanged."""
    url = server.fresh("newer")
    database = PostgresStorage(url)
    with database.transaction() as connection:
        connection.execute("INSERT INTO migrations VALUES ('from_the_future', 0)")
    before = database.dump()
    with pytest.raises(ConfigError, match=r"newer coordinator \(migration from_the_future\); upgrade"):
        PostgresStorage(url)
    assert database.dump() == before
    database.close()


@needs_postgres
@pytest.mark.parametrize("count", range(len(migrations.ALL)))
def test_a_database_of_an_earlier_version_goes_on(
    server: PostgresServer, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From every earlier set of migrations PostgreSQL comes to the present one, with what was in it."""
    whole = migrations.ALL
    url = server.fresh(f"earlier{count}")
    monkeypatch.setattr(migrations, "ALL", whole[:count])
    old = PostgresStorage(url)
    if count:
        with old.transaction() as connection:
            token_rows.add(connection, "kept", expires_s=1.0)
    old.close()
    monkeypatch.setattr(migrations, "ALL", whole)
    database = PostgresStorage(url)
    with database.reading() as connection:
        assert (token_rows.find(connection, "kept") is not None) == (count > 0)
        applied = {str(row[0]) for row in connection.execute("SELECT name FROM migrations")}
    assert applied == {step.__name__ for step in whole}
    database.close()


def asked_of_pages(connection: Connection, run_id: str, now_s: float) -> list[object]:
    """What the dashboard and the metrics ask, without what hangs on chance and on the clock."""
    figures = monitor_rows.figures(connection, now_s=now_s, slack_s=30.0)
    device = fleet_rows.find_device(connection, "a")
    assert device is not None
    tasks = fleet_rows.tasks_of_device(connection, device["device_id"], limit=9)
    assert fleet_rows.fingerprint(connection) == fleet_rows.fingerprint(connection)
    assert isinstance(figures.bytes_up, int)
    return [
        (
            dict(figures.devices),
            dict(figures.runs),
            dict(figures.rounds),
            dict(figures.tasks),
            figures.releases,
        ),
        [(each.device_class, each.memory) for each in fleet_rows.newest_memory(connection)],
        [each.code for each in fleet_rows.troubles(connection, ("enrolled", "run_created"))],
        [each.count for each in fleet_rows.troubles(connection, ("enrolled",), run_id=run_id)],
        [(row["round"], row["state"], row["examples"]) for row in tasks],
        [row["code"] for row in fleet_rows.events_of_device(connection, "a", limit=9)],
        [row["code"] for row in fleet_rows.newest_events(connection, run_id, limit=9)],
        fleet_rows.train_losses(connection, run_id),
        [row.round for row in round_rows.newest_rounds(connection, run_id, before=9, limit=9)],
        [row.state for row in run_rows.newest(connection, before=9, limit=9)],
        len(result_rows.of_round(connection, run_id, 0)),
        sorted(result_rows.devices_of(connection, run_id, 0).values()),
    ]


@needs_postgres
def test_a_run_on_both_databases_ends_in_the_same_bits(
    server: PostgresServer, endpoint: str, credentials: None, tmp_path: Path
) -> None:
    """A run on PostgreSQL and S3 goes through the states and values that it goes through on a file and a folder."""
    found = []
    places = Places(server.fresh("run"), f"s3://{BUCKET}/run?endpoint={endpoint}", tmp_path / "secrets")
    for where, kind in ((None, "file"), (places, "server")):
        (tmp_path / kind).mkdir()
        world = World(tmp_path / kind, specs=SPECS, places=where)
        devices = world.fleet("a", "b", "c")
        world.create_run(rounds=2, seed=5)
        while (run := world.run())["state"] not in ("finished", "failed"):
            world.work(devices)
        with world.stores.storage.transaction() as connection:
            release_rows.publish_each_round(connection, run["run_id"], release_rows.Limits(0.5, None))
            release_rows.publish_each_round(connection, run["run_id"], release_rows.Limits(None, 2.0))
            assert release_rows.limits_of_each_round(connection, run["run_id"]) == release_rows.Limits(
                None, 2.0
            )
            release = release_rows.add(
                connection, run["run_id"], 0, "v", release_rows.Limits(None, None), published_s=1.0
            )
            assert release.number == 1
            assert run_rows.get(connection, run["run_id"]).committed == 2
            assert task_rows.asked_in_phase(connection, run["run_id"], "training") != set()
            user = user_rows.UserRow("u", "viewer", None, "t", 1.0)
            assert [user_rows.add(connection, user), user_rows.add(connection, user)] == [True, False]
            numbers = [
                audit_rows.begin(connection, at_s=1.0, who=who, act="a", subject="s") for who in ("", "", "u")
            ]
            audit_rows.end(connection, numbers[2], outcome="done", detail="d")
            audit_rows.forget_strangers(connection, kept=1)
            acts = audit_rows.newest(connection, before=99, limit=9)
            assert [act.audit_id - numbers[0] for act in acts[:2]] == [2, 1]
            pages = asked_of_pages(connection, run["run_id"], world.clock.now_s)
        listing = world.admin("GET", "/v1/admin/devices").json()
        events = world.admin("GET", f"/v1/admin/runs/{run['run_id']}/events").json()
        found.append(
            (
                world.values(),
                run["state"],
                [(each["state"], each["round"]) for each in run["rounds"]],
                [each["name"] for each in listing],
                [each["code"] for each in events],
                pages,
            )
        )
        world.stores.storage.close()
    assert found[0] == found[1]
    assert found[0][1] == "finished"
