"""The fleet: how many devices are in which state, what memory their tasks took, what went wrong; and one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from coordinator.refusals import NotFoundError
from coordinator.rounds.runs import active_runs
from coordinator.rounds.summary import TROUBLES, DeviceSummary, devices_of, standings_of
from coordinator.storage import fleet_rows, release_rows, result_rows, set_aside_rows
from coordinator.storage.connection import Connection, Row
from coordinator.storage.stores import Stores
from edge_runtime.protocol.messages import MemoryReport

#: States in the order in which tables have them.
STATES = (
    *("working", "asked", "ready", "not eligible", "silent", "set aside", "cap too small"),
    *("never seen", "revoked"),
)
#: Lines of a page of devices, tasks or events.
MOST_DEVICES, MOST_TASKS, MOST_EVENTS = 100, 50, 50
#: Classes of devices that a table has at most; the others are counted together.
MOST_CLASSES = 12
OTHERS = "others"


@dataclass(frozen=True)
class ClassCount:
    """Devices of one class.

    Attributes:
        name: the class.
        states: number of devices in each of :data:`STATES`.
    """

    name: str
    states: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return sum(self.states)


@dataclass(frozen=True)
class MemoryOfClass:
    """Peaks of the newest results of a class, in bytes.

    Attributes:
        name: the class.
        results: number of results.
        predicted_bytes: largest predicted peak.
        measured_bytes: largest measured peak.
        cap_bytes: smallest cap.
        worst: largest excess of a measured over its predicted peak, relative to that; below 0 where none exceeded.
    """

    name: str
    results: int
    predicted_bytes: int
    measured_bytes: int
    cap_bytes: int
    worst: float


def count_classes(stores: Stores, connection: Connection, *, now_s: float) -> list[ClassCount]:
    """Devices by class and state, the largest classes first."""
    counts: dict[str, Counter[str]] = {}
    for row, (state, _) in standings_of(stores, connection, now_s=now_s):
        counts.setdefault(row["device_class"], Counter())[state] += 1
    names = sorted(counts, key=lambda name: (-counts[name].total(), name))
    shown = [(name, counts[name]) for name in names[:MOST_CLASSES]]
    if len(names) > MOST_CLASSES:
        shown.append((OTHERS, sum((counts[name] for name in names[MOST_CLASSES:]), Counter())))
    return [ClassCount(name, tuple(found[state] for state in STATES)) for name, found in shown]


def memory_by_class(connection: Connection) -> list[MemoryOfClass]:
    """Predicted beside measured peaks of the newest results, by class."""
    found: dict[str, list[MemoryReport]] = {}
    for entry in fleet_rows.newest_memory(connection):
        found.setdefault(entry.device_class, []).append(entry.memory)
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:MOST_CLASSES]
    return [
        MemoryOfClass(
            name=name,
            results=len(found[name]),
            predicted_bytes=max(memory.predicted_peak_bytes for memory in found[name]),
            measured_bytes=max(measured_bytes(memory) for memory in found[name]),
            cap_bytes=min(memory.cap_bytes for memory in found[name]),
            worst=max(
                measured_bytes(memory) / memory.predicted_peak_bytes - 1
                if memory.predicted_peak_bytes
                else 0.0
                for memory in found[name]
            ),
        )
        for name in names
    ]


def measured_bytes(memory: MemoryReport) -> int:
    """The most that a worker took, by either measure."""
    return max(memory.high_water_bytes, memory.cgroup_peak_bytes or 0)


def troubles_of(connection: Connection, run_id: str | None = None) -> list[dict[str, Any]]:
    """Refusals and failures by reason, in words."""
    return [
        {"what": TROUBLES[each.code], "code": each.code, "count": each.count, "devices": each.devices}
        | {"message": each.message[:300]}
        for each in fleet_rows.troubles(connection, tuple(TROUBLES), run_id=run_id)
    ]


def fleet_page(
    stores: Stores,
    connection: Connection,
    *,
    state: str,
    device_class: str,
    search: str,
    page: int,
    now_s: float,
) -> dict[str, Any]:
    """A page of devices, chosen by state, class and the beginning of the name."""
    devices = [
        device
        for device in devices_of(stores, connection, now_s=now_s)
        if (not state or device.state == state)
        and (not device_class or device.device_class == device_class)
        and device.name.startswith(search)
    ]
    first = max(0, page) * MOST_DEVICES
    return {
        "devices": devices[first : first + MOST_DEVICES],
        "found": len(devices),
        "page": page,
        "pages": max(1, -(-len(devices) // MOST_DEVICES)),
        "state": state,
        "device_class": device_class,
        "search": search,
        "states": STATES,
    }


def device_page(stores: Stores, connection: Connection, name: str, *, now_s: float) -> dict[str, Any]:
    """All about a device, named by id or name.

    Raises:
        NotFoundError: ``unknown_device``.
    """
    row = fleet_rows.find_device(connection, name)
    if row is None:
        raise NotFoundError("unknown_device", f"no device {name} ever enrolled; the fleet's page lists all")
    summary = next(
        each for each in devices_of(stores, connection, now_s=now_s) if each.device_id == row["device_id"]
    )
    tasks = [
        _task(entry) for entry in fleet_rows.tasks_of_device(connection, row["device_id"], limit=MOST_TASKS)
    ]
    release = release_rows.newest(connection)
    return {
        "device": summary,
        "row": row,
        "tasks": tasks,
        "held": next((task for task in tasks if task["state"] in ("reserved", "working")), None),
        "report": next((task for task in tasks if task["memory"] is not None), None),
        "sums": _sums(stores, connection, row["device_id"]),
        "newest_release": release.number if release is not None else 0,
        "aside": _aside(stores, connection, summary),
        "events": fleet_rows.events_of_device(connection, row["name"], limit=MOST_EVENTS),
    }


def _task(row: Row) -> dict[str, Any]:
    task = dict(row)
    memory = row["memory"]
    task["memory"] = None if memory is None else msgspec.json.decode(memory, type=MemoryReport)
    task["measured_bytes"] = None if memory is None else measured_bytes(task["memory"])
    return task


def _sums(stores: Stores, connection: Connection, device_id: str) -> Sequence[str]:
    """Runs that are going on and count sums of the device."""
    return [
        run.run_id
        for run in active_runs(stores, connection)
        if run.config.head == "closed_form" and result_rows.standing_sums(connection, run.run_id, device_id)
    ]


def _aside(stores: Stores, connection: Connection, device: DeviceSummary) -> list[tuple[str, str]]:
    """Runs that have set the device aside, with their reasons."""
    found = []
    for run in active_runs(stores, connection):
        entry = set_aside_rows.find(connection, run.run_id, device.device_id)
        if entry is not None:
            found.append((run.run_id, entry.reason))
    return found
