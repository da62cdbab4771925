"""A coordinator's state from one place to another: backup, restore, and the move from a folder to servers.

A backup is a state folder, whatever the state was kept in, and a coordinator can be started on it. Results that are on
their way in parts are not copied: their devices begin them anew.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from coordinator.storage import device_rows, masking_rows, result_rows, run_rows
from coordinator.storage.blob_store import Blobs, BlobStore
from coordinator.storage.connection import Connection, Cursor, Row
from coordinator.storage.database import Storage, pending_migrations
from coordinator.storage.stores import (
    BLOBS,
    DATABASE,
    LOCK,
    PRIVATE,
    TASK_KEY,
    Places,
    open_blobs,
    open_server,
    open_stores,
)
from edge_runtime.durable import make_private_folder
from edge_runtime.errors import ConfigError, ResourceError
from edge_runtime.folder_lock import claim_folder

ADMIN_TOKEN = "admin.token"  # noqa: S105 - a file name
#: Tables that are not copied: each database has its own.
OWN = ("migrations", "shared", "upload_parts", "simulated_clock")
#: What the database of a folder is called once it has moved.
MOVED = "coordinator.db.moved"
ROWS_AT_ONCE = 1000
#: How often a backup begins anew because rounds went on too fast for it.
MOST_ATTEMPTS = 10
#: Longest validity of a signed request, with the second in which it was signed.
SIGNATURE_S = 301.0


def backup(state: Path, places: Places, output: Path) -> int:
    """Copy the state of a coordinator, which may serve meanwhile, into a new folder; returns the number of blobs.

    Raises:
        ConfigError: there is no state, it is of another version, or the folder is not empty.
        ResourceError: rounds go on too fast, or a server does not answer now.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; give --output a new folder")
    _check_secrets(places.secrets or state)
    sources = open_blobs(state, places.blobs, durable=True)
    make_private_folder(output)
    kept = (BlobStore(output / BLOBS), BlobStore(output / PRIVATE))
    for _ in range(MOST_ATTEMPTS):
        _copy_blobs(sources, kept)
        database = output / DATABASE
        database.unlink(missing_ok=True)
        _snapshot(state, places, database)
        count = _copy_blobs(sources, kept)
        with closing(_connect(database)) as connection:
            needed = result_rows.needed_blobs(connection) | masking_rows.vectors(connection)
        if all(kept[1].find(sha256) is not None for sha256 in needed):
            _copy_secrets(places.secrets or state, output)
            return count
        # A round was committed between the copies, and what it had needed went with it.
    raise ResourceError(f"rounds end faster than {state} can be copied; pause the runs, and back up again")


def restore(source: Path, state: Path, places: Places) -> int:
    """Fill an empty place with what a backup holds; returns the number of blobs.

    Requests that were signed before this moment are refused from now on, since the backup does not know which of them
    were used up.

    Raises:
        ConfigError: the backup is not whole or of a newer version, or there is a state already.
        ResourceError: a server does not answer now.
    """
    return _fill(source, state, places, is_old=True)


def migrate(state: Path, places: Places) -> int:
    """Move the database of a state folder, and its blobs if that is asked for, to servers; returns the number of blobs.

    The coordinator must have ended. Its database stays in the folder, under the name :data:`MOVED`.

    Raises:
        ConfigError: a coordinator serves the folder, there is no state, or one is there already.
        ResourceError: a server does not answer now.
    """
    if places.database is None:
        raise ConfigError(
            "migrate moves a state folder to a server; say where to: --database postgresql://USER@HOST/NAME"
        )
    with _locked(state):
        count = _fill(state, state, places, is_old=False)
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            path = state / name
            if path.exists():
                path.rename(state / name.replace(DATABASE, MOVED))
    return count


def _fill(source: Path, state: Path, places: Places, *, is_old: bool) -> int:
    # 1. Is the source whole, and the target empty? Nothing is written before that is known.
    database = source / DATABASE
    if not database.exists():
        raise ConfigError(f"{source} holds no coordinator's state: there is no {DATABASE} in it")
    _check_secrets(source)
    with closing(_connect(database)) as connection:
        _check_version(connection)
    secrets = places.secrets or state
    if places.database is None and (state / DATABASE).exists():
        raise ConfigError(
            f"{state} holds a coordinator's state already; restore into a new folder, or move it away"
        )
    key = secrets / TASK_KEY
    if key.exists() and key.read_bytes() != (source / TASK_KEY).read_bytes():
        raise ConfigError(f"{key} is another coordinator's key; give a new folder, or move it away")
    server = None if places.database is None else open_server(places.database)
    if server is not None:
        with closing(server), server.reading() as connection:
            if run_rows.find_newest(connection) is not None or device_rows.all_devices(connection):
                raise ConfigError(
                    "--database holds a coordinator's state already; create a new database, or drop it"
                )
    # 2. Secrets and blobs first, so that the database never names bytes that are not there.
    make_private_folder(state)
    _copy_secrets(source, secrets)
    targets = open_blobs(state, places.blobs, durable=True)
    sources = open_blobs(source, None, durable=True)
    count = len(list(sources[0].digests())) + len(list(sources[1].digests()))
    if source != state or places.blobs is not None:
        count = _copy_blobs(sources, targets)
    # 3. The rows, in one transaction.
    if server is None:
        with closing(_connect(database)) as one, closing(sqlite3.connect(state / f"{DATABASE}.new")) as two:
            one.backup(two)
        (state / f"{DATABASE}.new").rename(state / DATABASE)
    stores = open_stores(state, places=places)
    try:
        with stores.storage.transaction() as connection:
            if server is not None:
                with closing(_connect(database)) as one:
                    _copy_rows(one, connection, one)
                server.continue_numbers(connection)
            if is_old:
                device_rows.refuse_nonces(connection, until_s=time.time() + SIGNATURE_S)
    finally:
        stores.storage.close()
    return count


def _snapshot(state: Path, places: Places, output: Path) -> None:
    """The database as it stands at one moment, as a file of SQLite."""
    if places.database is None:
        if not (state / DATABASE).exists():
            raise ConfigError(f"{state} holds no coordinator's state: there is no {DATABASE} in it")
        with closing(_connect(state / DATABASE)) as source:
            _check_version(source)
            with closing(sqlite3.connect(output)) as target:
                source.backup(target)
        return
    server, copy = open_server(places.database), Storage(output)
    with closing(server), closing(copy), server.reading() as source, copy.transaction() as target:
        _copy_rows(source, target, target)


def _copy_rows(source: Connection, target: Connection, lite: Connection) -> None:
    """Copy all rows, table by table as they were made, so that each finds what it refers to.

    Args:
        source: connection to copy from.
        target: connection to copy to, whose tables are empty.
        lite: that of the two which is SQLite's.
    """
    tables = [
        str(row[0])
        for row in lite.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY rowid"
        )
    ]
    for table in tables:
        if table in OWN:
            continue
        cursor = source.execute(f'SELECT * FROM "{table}"')  # noqa: S608 - of the schema
        insert = ""
        for rows in _in_pieces(cursor):
            names = list(rows[0].keys())
            columns, marks = ", ".join(f'"{name}"' for name in names), ", ".join("?" * len(names))
            insert = insert or f'INSERT INTO "{table}" ({columns}) VALUES ({marks})'  # noqa: S608 - the same
            target.executemany(insert, [tuple(row) for row in rows])


def _in_pieces(rows: Cursor) -> Iterator[list[Row]]:
    piece: list[Row] = []
    for row in rows:
        piece.append(row)
        if len(piece) == ROWS_AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece


def _copy_blobs(sources: tuple[Blobs, Blobs], targets: tuple[Blobs, Blobs]) -> int:
    """Copy what the targets lack, and return how many blobs there are now."""
    count = 0
    for source, target in zip(sources, targets, strict=True):
        for sha256 in source.digests():
            path = source.find(sha256)
            if path is not None:  # else it was discarded meanwhile
                try:
                    target.put_file(path, sha256)
                except FileNotFoundError:
                    continue
                count += 1
    return count


def _check_secrets(folder: Path) -> None:
    for name in (TASK_KEY, ADMIN_TOKEN):
        if not (folder / name).exists():
            raise ConfigError(f"{folder} is no coordinator's state folder: there is no {name} in it")


def _copy_secrets(source: Path, target: Path) -> None:
    make_private_folder(target)
    for name in (TASK_KEY, ADMIN_TOKEN):
        if source != target and not (target / name).exists():
            shutil.copy2(source / name, target / name)  # with its mode, 0600


def _check_version(connection: sqlite3.Connection) -> None:
    """Refuse a database of a newer version, and one of an earlier, which this program would have to change first."""
    if pending_migrations(connection):
        raise ConfigError(
            "the database was written by an earlier coordinator; use that one's command, or start this one on it once"
        )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Keep coordinators off a state folder."""
    if not state.is_dir():
        raise ConfigError(f"{state} is no folder")
    with claim_folder(state / LOCK, what=f"the state folder {state}", who="edge-coordinator"):
        yield
