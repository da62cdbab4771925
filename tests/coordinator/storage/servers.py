"""Real servers for stores by URL, each in a folder of its own, reached by a socket of this machine alone."""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from tests.end_to_end.harness import wait_for

#: Where Debian's packages put what is not on the search path.
DEBIAN = Path("/usr/lib/postgresql")
#: Secrets of the S3 server, for its clients' environment.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "edge", "AWS_SECRET_ACCESS_KEY": "not-a-secret-key"}
BUCKET = "fleet"


def postgres_program(name: str) -> str | None:
    """Path of a program of the newest PostgreSQL here; None if there is none."""
    for path in sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda found: int(found.parts[-3]), reverse=True):
        return str(path)
    return shutil.which(name)


needs_postgres = pytest.mark.skipif(
    postgres_program("initdb") is None, reason="no PostgreSQL here: apt-get install postgresql"
)


@dataclass
class PostgresServer:
    """A PostgreSQL server in a folder, without a password and without a port on the network.

    Attributes:
        folder: folder of data, socket and log.
    """

    folder: Path

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._control("start", "-w", "-o", f"-k {self.folder} -h '' -c fsync=off -c max_connections=60")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; ``immediate`` as by a power cut, ``fast`` as an upgrade does."""
        self._control("stop", "-m", mode)

    def url(self, database: str) -> str:
        """URL of a database."""
        return f"postgresql://postgres@/{database}?host={quote(str(self.folder), safe='')}"

    def fresh(self, database: str) -> str:
        """URL of a new empty database of this name."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}" TEMPLATE template0')  # type: ignore[arg-type]
        return self.url(database)

    def _control(self, *words: str) -> None:
        program = postgres_program("pg_ctl")
        assert program is not None
        log = str(self.folder / "log")
        run_as_postgres([program, "-D", str(self.folder / "data"), "-s", "-l", log, *words], self.folder)


def run_as_postgres(words: list[str], folder: Path) -> None:
    """Run a program of PostgreSQL, which refuses to run as root: then as the user that Debian's package made."""
    if os.geteuid() == 0:
        words = ["runuser", "-u", "postgres", "--", *words]
    subprocess.run(words, check=True, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server, until the end of the block."""
    program = postgres_program("initdb")
    assert program is not None
    # A socket's path is at most 107 bytes long, so not below pytest's folders; and no other user may enter those.
    folder = Path(tempfile.mkdtemp(prefix="edge-pg-"))
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
    data = str(folder / "data")
    server = PostgresServer(folder)
    try:
        run_as_postgres([program, "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"], folder)
        server.start()
        yield server
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def shared_postgres() -> PostgresServer:
    """A PostgreSQL server for all tests of this process that leave it as it is."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(postgres_server())


@functools.cache
def shared_s3() -> str:
    """Address of an S3 server for all tests of this process that leave it as it is."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-s3-")))
    return stack.enter_context(s3_server(folder / "data"))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Address of an S3 server with an empty bucket, until the end of the block."""
    port = free_port()
    (folder / BUCKET).mkdir(parents=True)
    words = ["-m", "nanio", "serve", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    secrets = {
        "NANIO_ACCESS_KEY": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "NANIO_SECRET_KEY": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    }
    with (folder.parent / "s3.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words], env={**os.environ, **secrets}, stdout=log, stderr=log
        )

    def answers() -> bool:
        assert process.poll() is None, (folder.parent / "s3.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            return False
        return True

    try:
        wait_for("the S3 server", answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
