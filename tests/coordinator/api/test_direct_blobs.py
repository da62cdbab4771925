"""Devices fetch blobs from the bucket itself, by addresses that the coordinator signs: all of it real."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.api.serve import CoordinatorServer, ServeOptions, bind
from coordinator.auth import create_token
from coordinator.storage.stores import Places, open_stores
from edge_runtime.agent.client import Client, enrol
from edge_runtime.agent.transport import HttpTransport, Request
from edge_runtime.errors import ConfigError, RefusedError, UnreachableError
from edge_runtime.protocol.messages import EnrolRequest
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.storage.bad_storage import BadStorage, bad_storage
from tests.coordinator.storage.servers import BUCKET, CREDENTIALS, shared_s3

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


@dataclass
class Site:
    """A coordinator that sends devices to a bucket, and the way there.

    Attributes:
        client: an enrolled device's.
        transport: what it sends by.
        way: way to the bucket.
    """

    client: Client
    transport: HttpTransport
    way: BadStorage

    def fetched_directly(self) -> list[str]:
        """Heads of the requests to the bucket that a device made."""
        return [head for head in self.way.requests if "X-Amz-Signature=" in head.partition("\r\n")[0]]


def start(folder: Path, places: Places) -> tuple[CoordinatorServer, threading.Thread]:
    """A coordinator that serves in a thread."""
    server = bind(ServeOptions(folder, port=0, places=places))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.server.started:
        time.sleep(0.01)
    return server, thread


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A coordinator, a bucket with one blob, and a device."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with bad_storage(shared_s3()) as way:
        places = Places(blobs=f"s3://{BUCKET}/direct-{tmp_path.name}?endpoint={way.url}", direct=True)
        stores = open_stores(tmp_path / "state", places=places)
        assert stores.blobs.put(DATA) == SHA256
        with stores.storage.transaction() as connection:
            token = create_token(connection, valid_s=60.0, now_s=time.time())
        stores.storage.close()
        server, thread = start(tmp_path / "state", places)
        transport, key = HttpTransport(server.url), generate_key()
        device_id = enrol(transport, EnrolRequest(token, "a", "generic", key.public_key)).device_id
        yield Site(Client(transport, key, device_id), transport, way)
        transport.close()
        server.stop()
        thread.join()


def test_a_blob_comes_from_the_bucket(site: Site, tmp_path: Path) -> None:
    """A device is sent to the bucket, without its signature going there, and a download goes on where it broke off."""
    site.client.fetch_blob(SHA256, tmp_path / "whole", max_bytes=1 << 21)
    assert (tmp_path / "whole").read_bytes() == DATA
    (tmp_path / "half").write_bytes(DATA[: len(DATA) // 2])
    site.client.fetch_blob(SHA256, tmp_path / "half", max_bytes=1 << 21)
    assert (tmp_path / "half").read_bytes() == DATA
    first, second = site.fetched_directly()
    assert "edge-" not in first.lower()
    assert "authorization" not in first.lower()
    assert f"Range: bytes={len(DATA) // 2}-" in second


def test_the_coordinator_is_asked_where_the_bucket_fails(site: Site, tmp_path: Path) -> None:
    """Whatever the bucket answers a device, it gets the very bytes by the coordinator, which has them in its cache; one
    that there is none of is refused as ever."""
    for mood in ("errors", "closed", "other bytes"):
        site.way.mood = mood  # type: ignore[assignment]
        before = len(site.fetched_directly())
        (tmp_path / mood).write_bytes(DATA[:1000])
        site.client.fetch_blob(SHA256, tmp_path / mood, max_bytes=1 << 21)
        assert (tmp_path / mood).read_bytes() == DATA
        assert len(site.fetched_directly()) > before
    site.way.mood = "well"
    with pytest.raises(RefusedError, match="unknown_blob"):
        site.client.fetch_blob("0" * 64, tmp_path / "none", max_bytes=1 << 21)


def test_older_devices_are_sent_nowhere(site: Site, tmp_path: Path) -> None:
    """A device that does not say that it can gets the bytes from the coordinator."""
    answer = site.client._sign_and_send(Request("GET", f"/v1/blobs/{SHA256}", max_bytes=1 << 21))
    assert (answer.status, answer.body) == (200, DATA)
    assert site.fetched_directly() == []


def test_an_address_that_is_not_encrypted_is_not_used() -> None:
    """A device that speaks TLS with its coordinator follows no address without it, and no other scheme at all."""
    for base, url in (
        ("https://coordinator.example", "http://s3.example/x"),
        ("http://127.0.0.1:1", "ftp://s3.example/x"),
        ("http://127.0.0.1:1", ""),
    ):
        with pytest.raises(UnreachableError, match="not encrypted as the coordinator's"):
            HttpTransport(base).send(Request("GET", "/", url=url))
    with pytest.raises(UnreachableError) as unreachable:
        HttpTransport("http://127.0.0.1:1").send(
            Request("GET", "/", url="http://127.0.0.1:1/x?X-Amz-Signature=secret")
        )
    assert "secret" not in str(unreachable.value)


def test_it_needs_a_bucket(tmp_path: Path) -> None:
    """Without a bucket there is nowhere to send devices, which is said at the start."""
    with pytest.raises(ConfigError, match=r"--direct-blobs sends devices to a bucket.*give --blobs"):
        open_stores(tmp_path / "state", places=Places(direct=True))
