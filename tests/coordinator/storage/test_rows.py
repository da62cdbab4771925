"""Named queries: they are the only place of SQL, and they say so when what must be there is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from coordinator.storage import run_rows, task_rows
from tests.coordinator.api.test_device_api import reserved
from tests.coordinator.conftest import World

PROGRAM = Path(__file__).parents[3] / "coordinator"
#: How a statement of SQL begins.
STATEMENT = re.compile(
    r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|PRAGMA|WITH|BEGIN|COMMIT|ROLLBACK)\b"
)
CALLS = {"execute", "executemany", "executescript"}


def sql_in(path: Path) -> list[str]:
    """Lines of a module that run a statement, or hold the text of one."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        runs = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and STATEMENT.match(node.value)
        if runs or text:
            found.append(f"{path.relative_to(PROGRAM)}:{node.lineno}")
    return found


def test_sql_stands_in_the_storage_alone() -> None:
    """No module outside the storage folder runs a statement of SQL or holds the text of one."""
    storage = PROGRAM / "storage"
    outside = [path for path in sorted(PROGRAM.rglob("*.py")) if storage not in path.parents]
    assert [line for path in outside for line in sql_in(path)] == []
    assert sql_in(storage / "run_rows.py")


def test_a_run_that_must_exist(world: World) -> None:
    """Getting a run that is not there is a mistake of the caller, finding it is none."""
    run_id = world.create_run()
    with world.stores.storage.reading() as connection:
        assert run_rows.get(connection, run_id).run_id == run_id
        assert run_rows.find(connection, "other") is None
        with pytest.raises(LookupError, match="no run other"):
            run_rows.get(connection, "other")


def test_a_task_is_read_once_it_was_handed_out(world: World) -> None:
    """A reserved task holds nothing that was signed; once its device has checked in it holds what the device got."""
    world.fleet("a", "b")
    run_id = world.create_run()
    world.play()
    device = world.devices[reserved(world)[0]]

    def held() -> task_rows.TaskWithDevice:
        with world.stores.storage.reading() as connection:
            return task_rows.of_round(connection, run_id, 0)[0]

    assert held().signed is None
    with pytest.raises(LookupError, match="was not handed out"):
        held().read_task()
    task = device.task()
    assert held().read_task() == task
    assert held().signed == device.check_in()


#: Words of SQLite's own that PostgreSQL does not have, and what says the same in both.
SQLITE_ONLY = {
    "or ignore": "ON CONFLICT DO NOTHING",
    "or replace": "ON CONFLICT (…) DO UPDATE",
    "lastrowid": "RETURNING",
    "rowid": "a column of the table",
    "group_concat": "rows, joined in Python",
    "json_": "json.loads",
    "unixepoch": "a parameter",
    "glob": "LIKE",
    "+run_id": "run_id || ''",
}
#: What only SQLite ever runs: its own module, definitions of tables, copies, and simulations.
OF_SQLITE = ("database.py", "migrations.py", "copies.py", "simulation_rows.py")


def test_statements_are_of_both_databases() -> None:
    """No statement for all databases has a word of SQLite's alone, or a subquery without a name behind FROM or JOIN."""
    found = []
    for path in sorted((PROGRAM / "storage").glob("*.py")):
        if path.name in OF_SQLITE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = node.attr if isinstance(node, ast.Attribute) else ""
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else named
            if named != "lastrowid" and STATEMENT.match(text) is None and "SELECT" not in text:
                continue
            words = text.lower()
            found += [
                f"{path.name}:{node.lineno}: {word}; write {instead}"
                for word, instead in SQLITE_ONLY.items()
                if re.search(rf"(?<![a-z_]){re.escape(word)}", words)
            ]
    assert not found
