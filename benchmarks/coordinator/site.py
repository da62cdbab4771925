"""A coordinator process on one core, and requests to it that are signed and sent from another."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.coordinator.hand_made import RUN, slice_spec, write_package
from coordinator.admin.client import AdminClient, connect
from coordinator.auth import ADMIN_TOKEN
from coordinator.config import run_config
from coordinator.storage import device_rows
from coordinator.storage.stores import Places, open_stores
from edge_runtime.package.manifest import SliceSpec
from edge_runtime.protocol.signing import PrivateKey, generate_key, sign_request

ROOT = Path(__file__).parents[2]
#: Where the server runs, and where what sends requests: read before this process pins itself, which children inherit.
SERVER_CORE, LOAD_CORE = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
#: 16 numbers, as a small adapter has for a matrix, and a head.
SMALL = (slice_spec("block0.query", 0, (1, 4, 4)), slice_spec("head", 1, (1, 2, 2), "head"))
#: A result of 100 kB.
LARGE = (slice_spec("block0.query", 0, (1, 100, 250)), slice_spec("head", 1, (1, 2, 2), "head"))


@dataclass
class Site:
    """A coordinator's folder, and one key that all devices share: a signature costs the same whose ever it is.

    Attributes:
        folder: folder of state and package.
        specs: slices of the package.
        devices: number of enrolled devices.
        files: further files of the package, by name.
        places: where state lies that is not in the state folder.
        ids: ids of the devices.
        key: their key.
        publisher: key that signs the package.
    """

    folder: Path
    specs: tuple[SliceSpec, ...]
    devices: int
    files: dict[str, bytes] = field(default_factory=dict)
    places: Places | None = None
    ids: list[str] = field(init=False)
    key: PrivateKey = field(default_factory=generate_key)
    publisher: PrivateKey = field(default_factory=generate_key)
    port: int = 0

    def __post_init__(self) -> None:
        self._nonces = count()
        stores = open_stores(self.state, places=self.places)
        names = [f"device-{number:05d}" for number in range(self.devices)]
        with stores.storage.transaction() as connection:
            for name in names:
                device_rows.add(
                    connection,
                    f"d-{name}",
                    name=name,
                    device_class="load",
                    public_key=self.key.public_key,
                    enrolled_s=time.time(),
                )
        stores.storage.close()
        self.ids = [f"d-{name}" for name in names]
        write_package(self.folder / "package", self.publisher, self.specs, self.files)

    @property
    def state(self) -> Path:
        """State folder."""
        return self.folder / "state"

    @property
    def admin(self) -> AdminClient:
        """The operator's client."""
        if self.places is None or self.places.secrets is None:
            return connect(self.state, None, None, None)
        return connect(None, f"http://127.0.0.1:{self.port}", self.places.secrets / ADMIN_TOKEN, None)

    @contextmanager
    def serving(self) -> Iterator[psutil.Process]:
        """A coordinator on the first core, ready to serve, on the same port each time."""
        (self.state / "url").unlink(missing_ok=True)
        words = ["serve", "--state", str(self.state), "--port", str(self.port)]
        process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),  # noqa: PLW1509
        )
        try:
            while not (self.state / "url").exists():
                time.sleep(0.05)
            self.port = int(urlsplit((self.state / "url").read_text().strip()).port or 0)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()

    def create_run(self, **changes: object) -> str:
        """Queue a run."""
        table = {**RUN, "package": str(self.folder / "package"), "publisher_key": self.publisher.public_key}
        return self.admin.create_run(run_config({**table, **changes}))

    def request(self, number: int, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """A whole signed request of a device, by its number."""
        signed = sign_request(
            self.key,
            device_id=self.ids[number],
            method=method,
            path=path,
            body=body,
            now_s=int(time.time()),
            nonce=f"{os.getpid()}-{next(self._nonces):010d}",
        )
        kind = "application/msgpack" if method == "PUT" else "application/json"
        lines = [f"{name}: {value}" for name, value in {**signed, "Content-Type": kind, **headers}.items()]
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: load", *lines])
        return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def send(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bytes]:
    """Status and body of the answer to a request on a connection that is kept."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
    return int(head[9:12]), await reader.readexactly(size)


def peak_bytes(process: psutil.Process) -> int:
    """The most memory that a process ever held."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
