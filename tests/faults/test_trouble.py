"""A coordinator whose database another process holds locked for longer than it waits."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from edge_runtime.protocol.messages import CheckInRequest, encode
from tests.faults.lone_site import lone_site

CHECK_IN = encode(CheckInRequest("test", 1 << 30, 1 << 20, 10))
#: Longer than the coordinator waits for a lock.
HELD_S = 7.0


def test_a_lock_that_is_held_ends_nothing(tmp_path: Path) -> None:
    """While the lock is held a request is answered with 503 and when to come again; afterwards all is as before."""
    with lone_site(tmp_path / "state") as site:
        other = sqlite3.connect(site.state / "coordinator.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        begun_s = time.monotonic()
        answer = site.send("POST", "/v1/check-in", CHECK_IN, site.signed("POST", "/v1/check-in", CHECK_IN))
        assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (503, True)
        time.sleep(max(0.0, begun_s + HELD_S - time.monotonic()))
        other.execute("ROLLBACK")
        other.close()
        answer = site.send("POST", "/v1/check-in", CHECK_IN, site.signed("POST", "/v1/check-in", CHECK_IN))
        assert answer.status == 200
        assert site.process.poll() is None
