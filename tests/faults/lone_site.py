"""A coordinator alone in a process of its own, with few descriptors, and one enrolled device."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from coordinator.admin.client import AdminClient, connect
from edge_runtime.protocol.messages import EnrolRequest, EnrolResponse, decode, encode
from edge_runtime.protocol.signing import PrivateKey, generate_key, sign_request
from tests.end_to_end.harness import ROOT, wait_for

DESCRIPTORS = 256


@dataclass
class Site:
    """A coordinator in a process of its own, with few descriptors, and one enrolled device."""

    process: subprocess.Popen[bytes]
    state: Path
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


@contextmanager
def lone_site(state: Path) -> Iterator[Site]:
    """A coordinator that serves one device, until the end of the block; its log must tell of no crash."""
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
    yield Site(process, state, admin, url, key, decode(answer.data, EnrolResponse).device_id)
    process.terminate()
    assert process.wait(30) == 0
    assert not (state / "url").exists()  # it would name nobody
    assert "Traceback" not in (state.parent / "log").read_text()
