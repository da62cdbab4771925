"""Whether this process can do its work now: what a load balancer or an orchestrator asks before it sends requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from coordinator.storage import run_rows
from coordinator.storage.stores import Stores
from coordinator.storage.trouble import trouble_of

#: Room on the disk below which results may not fit.
LEAST_FREE_BYTES = 64 << 20


class Readiness(Struct, frozen=True):
    """What stands in the way of work.

    Attributes:
        status: ``ready`` or ``not ready``.
        reasons: what is missing, one sentence each; empty where nothing is.
    """

    status: str
    reasons: list[str] = []


def readiness(stores: Stores, ended_loops: Sequence[str]) -> Readiness:
    """What stands in the way of work, looked at now.

    Args:
        stores: handles on the state folder.
        ended_loops: names of loops behind the API that have ended by an error.
    """
    reasons = [f"the loop {name} has ended" for name in ended_loops]
    try:
        with stores.storage.reading() as connection:
            run_rows.in_turn(connection)
    except Exception as error:  # noqa: BLE001 - whatever a database raises, it cannot be read
        reasons.append(f"the database cannot be read: {trouble_of(error) or type(error).__name__}")
    reasons += _folder(stores.folder)
    return Readiness("not ready" if reasons else "ready", reasons)


def _folder(folder: Path) -> list[str]:
    if not os.access(folder, os.W_OK):
        return ["the state folder cannot be written"]
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < LEAST_FREE_BYTES:
        return [f"the disk has {free_bytes >> 20} MiB left of at least {LEAST_FREE_BYTES >> 20} MiB"]
    return []
