"""``edge-runtime status``: who this device is, and what lies in its state folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from edge_runtime.agent.conditions import Conditions
from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.agent.eligibility import Gate, Reason
from edge_runtime.agent.host import Host
from edge_runtime.agent.own_rows import count_own_rows
from edge_runtime.agent.store import Store
from edge_runtime.figures import size
from edge_runtime.protocol.messages import decode_result


class Status(Struct, frozen=True):
    """State of a device, without keys and rows.

    Attributes:
        device_name: name of the device.
        device_class: kind of the device.
        device_id: id that it got when it enrolled; empty before that.
        coordinator_url: address of its coordinator.
        cap_bytes: memory granted to a worker.
        downloads_bytes: disk space of downloads.
        disk_quota_bytes: disk space that they may take.
        pending_task: name of the task whose result waits to be handed in; empty if none does.
        trains: whether the device takes tasks.
        release: number of the release in use; 0 if there is none.
        release_run: name of the run that made it; empty if there is none.
        release_accuracy: what it scored on the device's own rows; None where there were none.
        not_eligible: why the device may not work at this moment; empty if it may. A running agent that waits for the
            device to cool down knows of that; what is measured now does not.
    """

    device_name: str
    device_class: str
    device_id: str
    coordinator_url: str
    cap_bytes: int
    downloads_bytes: int
    disk_quota_bytes: int
    pending_task: str
    trains: bool
    release: int
    release_run: str
    release_accuracy: float | None
    not_eligible: str = ""


def read_status(config_path: Path) -> Status:
    """The state of the device of a configuration.

    Raises:
        ConfigError: the configuration, or a file of the state folder, cannot be read.
        ProtocolError: the result that waits is malformed.
    """
    config = load_config(config_path)
    store = Store(config.state_folder, disk_quota_bytes=config.disk_quota)
    identity, pending, taken = store.identity(), store.pending(), store.releases.state().current
    return Status(
        device_name=config.device_name,
        device_class=config.device_class,
        device_id=identity.device_id if identity else "",
        coordinator_url=config.coordinator_url,
        cap_bytes=config.cap,
        downloads_bytes=store.blobs.used_bytes(),
        disk_quota_bytes=config.disk_quota,
        pending_task=decode_result(pending).task_id if pending else "",
        trains=config.train,
        release=taken.release.number if taken else 0,
        release_run=taken.release.run_id if taken else "",
        release_accuracy=taken.accuracy if taken else None,
        not_eligible=reason_now(config, store) or "",
    )


def reason_now(config: DeviceConfig, store: Store) -> Reason | None:
    """Why the device may not work at this moment; None if it may.

    Raises:
        DataError: rows have to be counted, and cannot be.
    """
    rows = count_own_rows(config, "train", store.split_key()) if config.eligibility.least_rows else 0
    gate = Gate(config.eligibility, Conditions(Host(), config.state_folder))
    return gate.reason(rows=rows, needed_bytes=config.cap)


def status_lines(status: Status) -> Iterator[str]:
    """The state in words."""
    yield f"device       {status.device_name} ({status.device_class})"
    yield f"enrolled     {status.device_id or 'no'}"
    yield f"coordinator  {status.coordinator_url}"
    yield f"cap          {size(status.cap_bytes)}"
    yield f"downloads    {size(status.downloads_bytes)} of {size(status.disk_quota_bytes)}"
    yield f"pending      {f'result of task {status.pending_task}' if status.pending_task else 'nothing'}"
    if status.not_eligible:
        yield f"eligible     no: {status.not_eligible}"
    if not status.trains:
        yield "training     no; the device only fetches releases"
    if status.release == 0:
        yield "release      none"
        return
    scored = (
        ""
        if status.release_accuracy is None
        else f", accuracy {status.release_accuracy:.3f} on the rows here"
    )
    yield f"release      {status.release}, of run {status.release_run}{scored}"
