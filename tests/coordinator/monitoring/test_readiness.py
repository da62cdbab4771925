"""Whether the process can work, as a load balancer asks."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest

from coordinator.monitoring import readiness
from tests.coordinator.conftest import World


def test_a_coordinator_that_works_is_ready(world: World) -> None:
    """Anybody is told so, and nothing else."""
    answer = world.client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "reasons": []})


def test_a_full_disk_is_not_ready(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is told with both figures, and the process lives on."""
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    answer = world.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == [
        f"the disk has 1 MiB left of at least {readiness.LEAST_FREE_BYTES >> 20} MiB"
    ]
    assert world.client.get("/healthz").status_code == 200


def test_a_database_that_is_closed_is_not_ready(world: World) -> None:
    """A database that cannot be read is told, in one sentence."""
    world.stores.storage.close()
    answer = world.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == ["the database cannot be read: ProgrammingError"]
    world.start()


def test_a_loop_that_ended_is_not_ready(world: World) -> None:
    """A coordinator whose rounds go on no more takes no requests from a balancer."""
    world.app.state.app_state.ended_loops.append("rounds")
    assert world.client.get("/readyz").json()["reasons"] == ["the loop rounds has ended"]
