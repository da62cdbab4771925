"""What strangers may do to a coordinator: take none of its memory, and keep nobody out of it."""

from __future__ import annotations

import hashlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import urllib3

from coordinator.admin.client import AdminClient, connect
from edge_runtime.protocol.messages import (
    MAX_RESULT_BYTES,
    CheckInRequest,
    EnrolRequest,
    EnrolResponse,
    MemoryReport,
    Result,
    decode,
    encode,
    encode_result,
)
from edge_runtime.protocol.signing import PrivateKey, generate_key, sign_request
from tests.end_to_end.harness import ROOT, wait_for

MIB = 1 << 20
DESCRIPTORS = 256


@dataclass
class Site:
    """A coordinator in a process of its own, with few descriptors, and one enrolled device."""

    process: subprocess.Popen[bytes]
    admin: AdminClient
    url: str
    key: PrivateKey
    device_id: str
    nonces: int = 0

    def signed(self, method: str, path: str, body: bytes) -> dict[str, str]:
        """Headers that sign a request of the device."""
        self.nonces += 1
        return sign_request(
            self.key,
            device_id=self.device_id,
            method=method,
            path=path,
            body=body,
            now_s=int(time.time()),
            nonce=f"nonce-{self.nonces:08d}",
        )

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer to a request on a connection of its own."""
        with urllib3.PoolManager() as pool:
            return pool.request(method, self.url + path, body=body, headers=headers, retries=False)


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """The most memory that a process ever held."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A coordinator that serves one device."""
    state = tmp_path_factory.mktemp("site") / "state"
    with (state.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "serve", "--state", str(state), "--port", "0"],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS)),  # noqa: PLW1509
        )
    wait_for("an address", (state / "url").exists)
    admin = connect(state, None, None, None)
    key = generate_key()
    with urllib3.PoolManager() as pool:
        body = encode(EnrolRequest(admin.create_token(60.0), "a", "generic", key.public_key))
        url = (state / "url").read_text().strip()
        answer = pool.request("POST", f"{url}/v1/devices/enrol", body=body)
    assert answer.status == 201
    yield Site(process, admin, url, key, decode(answer.data, EnrolResponse).device_id)
    process.terminate()
    assert process.wait(30) in {0, -signal.SIGTERM}
    assert "Traceback" not in (state.parent / "log").read_text()


def at_once(count: int, site: Site, *arguments: Any) -> list[int]:
    """Statuses of the answers to so many requests at the same time; 0 where the connection was closed unanswered."""

    def one(_: int) -> int:
        try:
            return int(site.send(*arguments).status)
        except urllib3.exceptions.HTTPError:
            return 0

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_strangers_get_no_memory(site: Site) -> None:
    """Six bodies of 64 MiB at once from nobody in particular, or with a forged signature, cost no memory."""
    before_bytes = peak_bytes(site.process)
    body = b"x" * MAX_RESULT_BYTES
    path = "/v1/tasks/t/result"
    forged = {**site.signed("PUT", path, body), "Signature": site.signed("PUT", path, b"")["Signature"]}
    for headers in ({}, forged):
        assert set(at_once(6, site, "PUT", path, body, headers)) <= {0, 401}
    grown_bytes = peak_bytes(site.process) - before_bytes
    print(f"six times 64 MiB from strangers: {grown_bytes / MIB:.1f} MiB")
    assert grown_bytes < 8 * MIB


def test_devices_get_little_memory(site: Site) -> None:
    """Six results of 64 MiB at once from a device that may send them are held in memory one at a time."""
    before_bytes = peak_bytes(site.process)
    change = b"x" * (MAX_RESULT_BYTES - 4096)
    memory = MemoryReport(100, 90, 1000)
    digest = hashlib.sha256(change).hexdigest()
    body = encode_result(Result("t", "r", 0, 1, 1, 0, 0.5, 1.0, memory, digest, change))
    path = "/v1/tasks/t/result"
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(
            lambda headers: site.send("PUT", path, body, headers).status,
            [site.signed("PUT", path, body) for _ in range(6)],
        )
    assert list(answers) == [404] * 6
    grown_bytes = peak_bytes(site.process) - before_bytes
    print(f"six times 64 MiB from a device: {grown_bytes / MIB:.1f} MiB")
    assert grown_bytes < 3.5 * MAX_RESULT_BYTES


def test_idle_strangers_keep_nobody_out(site: Site) -> None:
    """1,100 idle connections leave the coordinator its descriptors: devices and operators are served meanwhile."""
    body = encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))
    parts = urlsplit(site.url)
    with ExitStack() as stack:
        for number in range(1100):
            connection = socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=20)
            stack.enter_context(connection)
            if number % 200 == 100:
                answer = site.send("POST", "/v1/check-in", body, site.signed("POST", "/v1/check-in", body))
                assert answer.status == 200
                assert len(site.admin.devices()) == 1
        assert len(psutil.Process(site.process.pid).net_connections("tcp")) < DESCRIPTORS
    assert site.process.poll() is None
