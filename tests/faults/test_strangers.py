"""What strangers may do to a coordinator: take none of its memory, and keep nobody out of it."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import urllib3

from edge_runtime.protocol.messages import (
    MAX_RESULT_BYTES,
    CheckInRequest,
    MemoryReport,
    Result,
    encode,
    encode_result,
)
from tests.faults.lone_site import DESCRIPTORS, Site, lone_site, peak_bytes

MIB = 1 << 20


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A coordinator that serves one device."""
    with lone_site(tmp_path_factory.mktemp("site") / "state") as site:
        yield site


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
