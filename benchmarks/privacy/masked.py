"""Masked rounds beside plain ones: the coordinator's CPU time and the bytes of a round of 100 devices, a tenth lost.

Both runs are of one coordinator process, one after the other, with the same values, changes and devices. Of the plain
round a tenth of the devices hands nothing in; of the masked one as many fall out after they have shared their secrets,
which is the dearest moment: their masks are then made again by the coordinator.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil
from msgspec.structs import replace

from benchmarks.coordinator.hand_made import slice_spec
from benchmarks.coordinator.site import Site, send
from benchmarks.harness.result_file import Figure, figure
from edge_runtime.masking.participant import (
    Participation,
    masked,
    open_shares,
    reveal,
    share_secrets,
    take_part,
)
from edge_runtime.package.manifest import Manifest, SliceSpec, parse_manifest
from edge_runtime.package.slices import encode_values, shapes
from edge_runtime.protocol.messages import (
    CheckInRequest,
    MaskingStage,
    MaskingWait,
    MemoryReport,
    Result,
    SendMasked,
    ShareSecrets,
    SignedTask,
    Task,
    Unmask,
    encode,
    encode_result,
)
from edge_runtime.training.protected import protect

#: LoRA-XS cores of rank 4 on query and value of six blocks, and a head of 384 features and six classes.
SLICES = tuple(
    slice_spec(f"block{block}.{name}", 0, (1, 4, 4)) for block in range(6) for name in ("query", "value")
)
SMALL = (*SLICES, slice_spec("head", 1, (1, 6, 384), "head"))
#: The same cores at rank 64: results of 200 kB.
WIDE = tuple(replace(spec, tensors=slice_spec(spec.name, 0, (1, 64, 64)).tensors) for spec in SLICES)
LARGE = (*WIDE, slice_spec("head", 1, (1, 6, 384), "head"))
CHECK_IN = CheckInRequest("load", 1 << 30, 0, 10, protects=True)


@dataclass(frozen=True)
class Load:
    """What is done.

    Attributes:
        devices: devices of a round.
        lost: devices of these that fall out.
        rounds: rounds of each run; of the plain one as many.
    """

    devices: int = 100
    lost: int = 10
    rounds: int = 1


@dataclass(frozen=True)
class Cost:
    """What a round took: the coordinator's CPU seconds, and the bytes of bodies both ways."""

    cpu_s: float
    up_bytes: int
    down_bytes: int


def measure(folder: Path, load: Load) -> list[Figure]:
    """Both kinds of rounds, of small and of large slices."""
    rows: list[Figure] = []
    for name, specs in (("10.4 kB", SMALL), ("206 kB", LARGE)):
        place = folder / name.replace(" ", "")
        place.mkdir()
        site = Site(place, specs, load.devices)
        with site.serving() as process:
            plain = asyncio.run(_run(site, process, load, secure=False))
            secure = asyncio.run(_run(site, process, load, secure=True))
        pairs = list(zip(secure, plain, strict=True))
        total = [(s.up_bytes + s.down_bytes) / (p.up_bytes + p.down_bytes) for s, p in pairs]
        rows += [
            figure(f"contributions of {name}: bytes over plain", "times", total, 2.0),
            figure(f"{name}: bytes up over plain", "times", [s.up_bytes / p.up_bytes for s, p in pairs]),
            figure(
                f"{name}: bytes of a plain round", "bytes", [float(p.up_bytes + p.down_bytes) for p in plain]
            ),
            figure(
                f"{name}: bytes of a masked round",
                "bytes",
                [float(s.up_bytes + s.down_bytes) for s in secure],
            ),
            figure(
                f"{name}: coordinator's CPU time over plain", "times", [s.cpu_s / p.cpu_s for s, p in pairs]
            ),
            figure(f"{name}: coordinator's CPU time of a plain round", "seconds", [p.cpu_s for p in plain]),
            figure(f"{name}: coordinator's CPU time of a masked round", "seconds", [s.cpu_s for s in secure]),
        ]
    return rows


async def _run(site: Site, process: psutil.Process, load: Load, *, secure: bool) -> list[Cost]:
    kept = load.devices - load.lost
    run_id = site.create_run(
        name="masked" if secure else "plain",
        devices_per_round=load.devices,
        min_devices=load.devices,
        min_results=kept,
        rounds=load.rounds,
        split="whole",
        deadline_s=3600.0,
        selection_timeout_s=60.0 if secure else 3600.0,
        poll_min_s=0.5,
        poll_max_s=1.0,
        secure_aggregation=secure,
        **({} if secure else {"enough_results": kept}),
    )
    costs = []
    connection = await asyncio.open_connection("127.0.0.1", site.port)
    for number in range(load.rounds):
        costs.append(await _round(site, process, connection, run_id, number, load, secure=secure))
    connection[1].close()
    return costs


async def _round(
    site: Site,
    process: psutil.Process,
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    run_id: str,
    number: int,
    load: Load,
    *,
    secure: bool,
) -> Cost:
    cpu = process.cpu_times()
    tasks = await _tasks(site, connection, load)
    manifest = parse_manifest((site.folder / "package" / "manifest.json").read_bytes())
    change = _change(site.specs)
    if secure:
        await _masked_round(site, connection, tasks, manifest, change, load)
    else:
        for device, task in list(tasks.items())[: load.devices - load.lost]:
            await _put(
                site,
                connection,
                device,
                f"/v1/tasks/{task.task_id}/result",
                encode_result(_result(task, change)),
            )
    while (run := await asyncio.to_thread(site.admin.run, run_id)).rounds_committed <= number:
        await asyncio.sleep(0.2)
    after = process.cpu_times()
    (entry,) = [each for each in run.rounds if each.round == number]
    return Cost(after.user + after.system - cpu.user - cpu.system, entry.bytes_up, entry.bytes_down)


async def _tasks(
    site: Site, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], load: Load
) -> dict[int, Task]:
    """Every device's task, with the values fetched."""
    tasks: dict[int, Task] = {}
    until_s = time.monotonic() + 120
    while len(tasks) < load.devices:
        if time.monotonic() > until_s:
            raise RuntimeError(f"{len(tasks)} of {load.devices} devices were asked")
        for device in range(load.devices):
            if device in tasks:
                continue
            _, body = await send(*connection, site.request(device, "POST", "/v1/check-in", encode(CHECK_IN)))
            if msgspec.json.decode(body)["answer"] != "task":
                continue
            task = msgspec.json.decode(msgspec.json.decode(body, type=SignedTask).task, type=Task)
            await send(*connection, site.request(device, "GET", f"/v1/blobs/{task.state}"))
            tasks[device] = task
        await asyncio.sleep(0.3)
    return tasks


async def _masked_round(
    site: Site,
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    tasks: dict[int, Task],
    manifest: Manifest,
    change: bytes,
    load: Load,
) -> None:
    """The devices' side of the masked stages; the last of them fall out once they have shared."""
    parts: dict[int, Participation] = {}
    for device, task in tasks.items():
        parts[device], keys = take_part(task, site.key)
        result = replace(_result(task, b""), masking=keys, examples=1, mean_loss=None)
        await _put(site, connection, device, f"/v1/tasks/{task.task_id}/result", encode_result(result))
    open_devices, gone = set(tasks), set(list(tasks)[load.devices - load.lost :])
    while open_devices:
        for device in sorted(open_devices):
            path = f"/v1/tasks/{tasks[device].task_id}/masking"
            _, body = await send(*connection, site.request(device, "GET", path))
            stage = msgspec.json.decode(body, type=MaskingStage)  # type: ignore[arg-type]
            if isinstance(stage, MaskingWait):
                continue
            if isinstance(stage, ShareSecrets):
                parts[device] = share_secrets(parts[device], stage)
                await _put(site, connection, device, f"{path}/shares", encode(parts[device].sealed))  # type: ignore[arg-type]
                if device in gone:
                    open_devices.discard(device)
            elif isinstance(stage, SendMasked):
                parts[device] = open_shares(parts[device], stage)
                data = protect(tasks[device], manifest, change, 4, bytes(32))
                await _put(site, connection, device, f"{path}/vector", masked(parts[device], data))
            elif isinstance(stage, Unmask):
                parts[device] = reveal(parts[device], stage)
                await _put(site, connection, device, f"{path}/reveal", encode(parts[device].revealed))  # type: ignore[arg-type]
                open_devices.discard(device)
            else:
                open_devices.discard(device)
        await asyncio.sleep(1.0)


async def _put(
    site: Site,
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    device: int,
    path: str,
    body: bytes,
) -> None:
    kind = "application/json" if path.endswith(("shares", "reveal")) else "application/msgpack"
    status, answer = await send(
        *connection, site.request(device, "PUT", path, body, **{"Content-Type": kind})
    )
    if status != 200:
        raise RuntimeError(answer.decode())


def _change(specs: tuple[SliceSpec, ...]) -> bytes:
    generator = np.random.default_rng(1)
    return encode_values(
        {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes(specs).items()}
    )


def _result(task: Task, change: bytes) -> Result:
    return Result(
        task_id=task.task_id,
        run_id=task.run_id,
        round=task.round,
        examples=4,
        steps_applied=1,
        steps_skipped=0,
        mean_loss=0.5,
        seconds=1.0,
        memory=MemoryReport(1, 1, 1),
        change_sha256=hashlib.sha256(change).hexdigest(),
        change=change,
    )
