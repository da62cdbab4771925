"""The device API: enrol, check in, fetch blobs, deliver results, report events. See docs/protocol.md."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
from litestar import Request, Response, Router, get, post, put
from litestar.datastructures import State
from litestar.params import FromPath, JSONBody, MsgPackBody
from litestar.response import Stream
from litestar.status_codes import HTTP_200_OK, HTTP_204_NO_CONTENT

from coordinator import auth
from coordinator.api.access import ACCESS, MAX_BODY_BYTES, Access
from coordinator.api.app_state import AppState
from coordinator.api.middleware import DEVICE
from coordinator.auth import Device
from coordinator.refusals import NotFoundError, RefusalError, UnavailableError
from coordinator.rounds import masked_rounds, results, tasks, uploads
from edge_runtime.errors import DigestError
from edge_runtime.protocol.messages import (
    DIRECT_HEADER,
    MAX_RESULT_BYTES,
    CheckInRequest,
    CheckInResponse,
    ComeBack,
    DeviceEvent,
    EnrolRequest,
    EnrolResponse,
    MaskingStage,
    Result,
    ResultReceipt,
    RevealedShares,
    SealedShares,
    Standing,
    UploadStanding,
)

#: Bytes of a download that wait for each client, so many and as much again in its connection.
CHUNK_BYTES = 64 << 10
DeviceRequest = Request[None, None, State]
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def _shared(request: DeviceRequest) -> AppState:
    """What all requests share. Dependencies of the framework would cost a tenth of a check-in."""
    app_state: AppState = request.app.state.app_state
    return app_state


def _device(request: DeviceRequest) -> Device:
    """The device whose signature was verified before the request came here."""
    device: Device = request.scope["state"][DEVICE]
    return device


@post("/enrol")
async def enrol(data: JSONBody[EnrolRequest], request: DeviceRequest) -> EnrolResponse:
    """Join with a one-time token."""
    app_state = _shared(request)
    device_id = await app_state.write(partial(auth.enrol, request=data, now_s=app_state.clock()))
    return EnrolResponse(device_id, app_state.stores.key.public_key)


@post("/check-in", status_code=HTTP_200_OK)
async def check_in(data: JSONBody[CheckInRequest], request: DeviceRequest) -> CheckInResponse:
    """Offer the device for work."""
    app_state, device = _shared(request), _device(request)
    answer: CheckInResponse = await app_state.write(
        lambda connection: tasks.check_in(app_state.stores, connection, device, data, now_s=app_state.clock())
    )
    if not isinstance(answer, ComeBack):  # a place was taken or given up; else the next tick will do
        app_state.wake.set()
    return answer


@put("/tasks/{task_id:str}/result", opt={MAX_BODY_BYTES: MAX_RESULT_BYTES})
async def deliver(
    task_id: FromPath[str],
    data: MsgPackBody[Result],
    request: DeviceRequest,
) -> ResultReceipt:
    """Deliver a task's result; repeating it is harmless."""
    app_state, device = _shared(request), _device(request)
    await _store_bytes(app_state, device, task_id, data)
    receipt = await app_state.write(
        lambda connection: results.accept(
            app_state.stores, connection, device, task_id, data, now_s=app_state.clock()
        )
    )
    app_state.wake.set()
    return receipt


async def _store_bytes(app_state: AppState, device: Device, task_id: str, result: Result) -> None:
    """Where blobs are on another machine, store a result's before the database is asked to count it."""
    if app_state.stores.private_blobs.is_remote:
        await app_state.read(partial(results.find_task, device=device, task_id=task_id))
        await asyncio.to_thread(results.store_bytes, app_state.stores, result)


@get("/tasks/{task_id:str}/upload/{sha256:str}")
async def tell_upload(
    task_id: FromPath[str], sha256: FromPath[str], request: DeviceRequest
) -> UploadStanding:
    """How far a result has come whose upload goes in parts."""
    app_state, device = _shared(request), _device(request)
    standing: UploadStanding = await app_state.read(
        lambda connection: uploads.standing(
            app_state.stores, connection, device, task_id, sha256, now_s=app_state.clock()
        )
    )
    return standing


@put("/tasks/{task_id:str}/upload/{sha256:str}/{offset:int}")
async def add_part(
    task_id: FromPath[str], sha256: FromPath[str], offset: FromPath[int], request: DeviceRequest
) -> UploadStanding:
    """Take a part of a result in, which begins where the upload stands."""
    app_state, device = _shared(request), _device(request)
    data = await request.body()
    standing: UploadStanding = await app_state.write(
        lambda connection: uploads.add_part(
            app_state.stores, connection, device, task_id, sha256, offset, data, now_s=app_state.clock()
        )
    )
    return standing


@post("/tasks/{task_id:str}/upload/{sha256:str}", status_code=HTTP_200_OK, opt={MAX_BODY_BYTES: 0})
async def finish_upload(
    task_id: FromPath[str], sha256: FromPath[str], request: DeviceRequest
) -> ResultReceipt:
    """Take in a result whose parts have all come; repeating it is harmless."""
    app_state, device = _shared(request), _device(request)
    await app_state.read(partial(uploads.check_owner, device=device, task_id=task_id, sha256=sha256))
    async with app_state.large_body:  # parsed in memory, so one at a time
        try:
            result = await asyncio.to_thread(uploads.read_whole, app_state.stores, task_id, sha256)
            await _store_bytes(app_state, device, task_id, result)
            receipt: ResultReceipt = await app_state.write(
                lambda connection: results.accept(
                    app_state.stores, connection, device, task_id, result, now_s=app_state.clock()
                )
            )
        except UnavailableError:
            raise
        except RefusalError:
            await asyncio.to_thread(app_state.stores.uploads.discard, task_id)
            raise
    await asyncio.to_thread(app_state.stores.uploads.discard, task_id)
    app_state.wake.set()
    return receipt


@post("/tasks/{task_id:str}/alive", status_code=HTTP_200_OK, opt={MAX_BODY_BYTES: 0})
async def say_alive(task_id: FromPath[str], request: DeviceRequest) -> Standing:
    """Say that a task is being worked on, so that its place waits for it."""
    app_state, device = _shared(request), _device(request)
    standing: Standing = await app_state.write(
        lambda connection: tasks.say_alive(
            app_state.stores, connection, device, task_id, now_s=app_state.clock()
        )
    )
    return standing


@get("/tasks/{task_id:str}/masking")
async def tell_masking_stage(task_id: FromPath[str], request: DeviceRequest) -> MaskingStage:
    """What is asked of a device whose contribution is masked."""
    app_state, device = _shared(request), _device(request)
    stage: MaskingStage = await app_state.read(
        lambda connection: masked_rounds.stage_for(app_state.stores, connection, device, task_id)
    )
    return stage


@put("/tasks/{task_id:str}/masking/shares")
async def take_shares(
    task_id: FromPath[str], data: JSONBody[SealedShares], request: DeviceRequest
) -> ResultReceipt:
    """Take in shares that a device sealed for its neighbours; repeating it is harmless."""
    app_state, device = _shared(request), _device(request)
    receipt: ResultReceipt = await app_state.write(
        lambda connection: masked_rounds.take_shares(app_state.stores, connection, device, task_id, data)
    )
    app_state.wake.set()
    return receipt


@put("/tasks/{task_id:str}/masking/vector", opt={MAX_BODY_BYTES: MAX_RESULT_BYTES})
async def take_masked(task_id: FromPath[str], request: DeviceRequest) -> ResultReceipt:
    """Take in a masked contribution; repeating it is harmless."""
    app_state, device = _shared(request), _device(request)
    data = await request.body()
    receipt: ResultReceipt = await app_state.write(
        lambda connection: masked_rounds.take_masked(app_state.stores, connection, device, task_id, data)
    )
    app_state.wake.set()
    return receipt


@put("/tasks/{task_id:str}/masking/reveal")
async def take_revealed(
    task_id: FromPath[str], data: JSONBody[RevealedShares], request: DeviceRequest
) -> ResultReceipt:
    """Take in the shares that unmask a sum; repeating it is harmless."""
    app_state, device = _shared(request), _device(request)
    receipt: ResultReceipt = await app_state.write(
        lambda connection: masked_rounds.take_revealed(app_state.stores, connection, device, task_id, data)
    )
    app_state.wake.set()
    return receipt


@post("/events", status_code=HTTP_204_NO_CONTENT)
async def report(data: JSONBody[DeviceEvent], request: DeviceRequest) -> None:
    """Tell operators something, or give a task back."""
    app_state, device = _shared(request), _device(request)
    await app_state.write(partial(tasks.report_event, device=device, event=data, now_s=app_state.clock()))
    app_state.wake.set()


@get("/blobs/{sha256:str}")
async def fetch_blob(sha256: FromPath[str], request: DeviceRequest) -> Response[None] | Stream:
    """Bytes of a blob, whole or one range of them; or the address where a device that asks so can fetch it itself."""
    blobs = _shared(request).stores.blobs
    sign_address = _shared(request).stores.sign_address
    try:
        if sign_address is not None and DIRECT_HEADER in request.headers:
            return Response(None, status_code=307, headers={"Location": sign_address(sha256)})
        path = blobs.here(sha256)
        if path is None and blobs.is_remote:
            path = await asyncio.to_thread(blobs.find, sha256)
    except DigestError as error:
        raise NotFoundError("unknown_blob", str(error)) from error
    if path is None:
        raise NotFoundError("unknown_blob", f"no blob {sha256}")
    etag = f'"{sha256}"'
    if request.headers.get("if-none-match") == etag:
        return Response(None, status_code=304, headers={"ETag": etag})
    return serve_file(
        path, etag=etag, asked=request.headers.get("range"), if_range=request.headers.get("if-range")
    )


def serve_file(path: Path, *, etag: str, asked: str | None, if_range: str | None) -> Response[None] | Stream:
    """Answer 200, 206 or 416 with the file's bytes (RFC 9110, section 14; one range at most).

    Args:
        path: path of the file.
        etag: strong validator of the file.
        asked: ``Range`` header; a form that is not understood is ignored, as the RFC has it.
        if_range: ``If-Range`` header; unless it is the ``etag``, the whole file is answered.
    """
    size = path.stat().st_size
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    span = _span(asked, size) if asked is not None and if_range in (None, etag) else (0, size)
    if span is None:
        return Response(None, status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    first, end = span
    headers["Content-Length"] = str(end - first)
    if (first, end) == (0, size):
        return Stream(_chunks(path, first, end), headers=headers)
    headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    return Stream(_chunks(path, first, end), headers=headers, status_code=206)


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """Byte range [first, end) of a ``Range`` header; None if it cannot be satisfied."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.group(0) == "bytes=-":
        return 0, size
    first_text, last_text = match.groups()
    if not first_text:
        length = min(int(last_text), size)
        return (size - length, size) if length > 0 else None
    first = int(first_text)
    end = min(int(last_text) + 1, size) if last_text else size
    if last_text and int(last_text) < first:
        return 0, size
    return (first, end) if first < size else None


async def _chunks(path: Path, first: int, end: int) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(first)
        left = end - first
        while left > 0:
            chunk = await file.read(min(CHUNK_BYTES, left))
            if not chunk:
                return
            left -= len(chunk)
            yield chunk


ENROLMENT = Router("/v1/devices", route_handlers=[enrol], opt={ACCESS: Access.TOKEN_HOLDER}, tags=["device"])
ROUTER = Router(
    "/v1",
    route_handlers=[
        check_in,
        deliver,
        tell_upload,
        add_part,
        finish_upload,
        say_alive,
        tell_masking_stage,
        take_shares,
        take_masked,
        take_revealed,
        report,
        fetch_blob,
    ],
    opt={ACCESS: Access.DEVICE},
    tags=["device"],
)
