"""The operators' API under /v1/admin, for users by their bearer tokens."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from litestar import Request, Response, Router, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response import Stream
from msgspec import Meta, Struct

from coordinator import accounts, auth
from coordinator.accounts import Role
from coordinator.api.access import ACCESS, ACT, Access
from coordinator.api.app_state import AppState
from coordinator.api.device_api import serve_file
from coordinator.api.middleware import TOLD
from coordinator.config import run_config
from coordinator.refusals import MalformedError, NotFoundError, UnusableError
from coordinator.rounds import releases, rollback, runs, set_aside
from coordinator.rounds.summary import (
    DeviceSummary,
    EventSummary,
    ReleaseSummary,
    RunSummary,
    devices_of,
    events_of,
    releases_of,
    summarise,
)
from coordinator.storage import audit_rows, run_rows, user_rows
from coordinator.storage.release_rows import Limits
from edge_runtime.errors import EdgeError
from edge_runtime.protocol.messages import Count, LossLimit, Share

MAX_EVENTS = 1000


class TokenRequest(Struct, frozen=True):
    """A request for a new enrolment token.

    Attributes:
        valid_s: seconds during which it may be used.
    """

    valid_s: Annotated[float, Meta(gt=0, le=365 * 86400)] = 86400.0


class TokenResponse(Struct, frozen=True):
    """A one-time enrolment token; it is shown once and kept as a digest only.

    Attributes:
        token: token to give to the device.
        expires_s: moment when it expires, in seconds since 1970.
    """

    token: str
    expires_s: float


class RunCreated(Struct, frozen=True):
    """A run that was queued.

    Attributes:
        run_id: id of the run.
    """

    run_id: str


class RunStopped(Struct, frozen=True):
    """A run that was asked to stop.

    Attributes:
        run_id: id of the run.
        was: state of the run before: queued, running or evaluating, and then it is stopped now; or finished, failed or
            stopped, and then nothing has changed.
    """

    run_id: str
    was: str


class RunPaused(Struct, frozen=True):
    """A run that was paused or resumed.

    Attributes:
        run_id: id of the run.
        paused: whether it is paused now.
        changed: whether it was not so before.
    """

    run_id: str
    paused: bool
    changed: bool


class RollBackRequest(Struct, frozen=True):
    """A request to let a run go back.

    Attributes:
        to: number of the committed round after which the run shall stand again.
    """

    to: Count


class RunRolledBack(Struct, frozen=True):
    """A run that went back.

    Attributes:
        run_id: id of the run.
        to: number of the round after which it stands.
        taken_back: number of later rounds that count no more; 0 if there were none, and then nothing has changed.
    """

    run_id: str
    to: int
    taken_back: int


class DeviceChanged(Struct, frozen=True):
    """A device that something was done about.

    Attributes:
        device_id: id of the device.
        name: name of the device.
    """

    device_id: str
    name: str


class ReleaseRequest(Struct, frozen=True):
    """A request to publish a run's values for devices to use.

    Attributes:
        run_id: id of the run; ``latest`` names the newest.
        round: number of the committed round after which the values stood; unset: those that the run is evaluated by.
        lowest_accuracy: least share of right predictions that a device must find on its own rows; unset asks for none.
        highest_loss: largest mean cross-entropy that it may find there; unset asks for none.
        each_round: whether each further committed round of the run becomes a release, too.
    """

    run_id: str = "latest"
    round: Count | None = None
    lowest_accuracy: Share | None = None
    highest_loss: LossLimit | None = None
    each_round: bool = False


class UserRequest(Struct, frozen=True):
    """A request to add a user.

    Attributes:
        name: name of the user.
        role: what the user may do: ``viewer``, ``operator`` or ``admin``.
        password: password to sign in with; unset: a token is made.
    """

    name: Annotated[str, Meta(max_length=200)]
    role: Role
    password: Annotated[str, Meta(max_length=1000)] | None = None


class UserAdded(Struct, frozen=True):
    """A user that was added.

    Attributes:
        name: name of the user.
        token: the user's token, which is shown once and kept as a digest only; None for one with a password.
    """

    name: str
    token: str | None


class UserSummary(Struct, frozen=True):
    """A user.

    Attributes:
        name: name of the user.
        role: what the user may do: ``viewer``, ``operator`` or ``admin``.
        signs_in_by: ``password`` or ``token``.
        created_s: moment when the user was added, in seconds since 1970.
    """

    name: str
    role: str
    signs_in_by: str
    created_s: float


class UserRemoved(Struct, frozen=True):
    """A user that was removed, with all sessions.

    Attributes:
        name: name of the user.
    """

    name: str


class Act(Struct, frozen=True):
    """Something that was asked for, as the audit log has it.

    Attributes:
        audit_id: its number; later acts have larger ones.
        at_s: moment when it was asked for, in seconds since 1970.
        who: name of the user, ``admin.token``, or empty for a stranger who tried to sign in.
        act: what was asked for.
        subject: what it was about; empty if nothing in particular.
        outcome: ``done``, the code of a refusal, or ``begun`` where the coordinator ended before it was known.
        detail: more about it, or why it was refused.
    """

    audit_id: int
    at_s: float
    who: str
    act: str
    subject: str
    outcome: str
    detail: str


#: Rights of routes that only look, and of those for admins.
LOOK = {ACCESS: Access.VIEWER}
ADMIN = {ACCESS: Access.ADMIN}


@post("/users", opt={**ADMIN, ACT: "add a user"})
async def add_user(
    data: JSONBody[UserRequest], request: Request[None, None, State], app_state: NamedDependency[AppState]
) -> UserAdded:
    """Add a user with a password, or with a token."""
    request.scope["state"][TOLD] = ("", f"{data.name}, {data.role}")
    return UserAdded(data.name, await new_user(app_state, data.name, data.role, data.password))


@get("/users", opt=ADMIN)
async def list_users(app_state: NamedDependency[AppState]) -> list[UserSummary]:
    """All users, by name."""
    return [
        UserSummary(row.name, row.role, "password" if row.password else "token", row.created_s)
        for row in await app_state.read(user_rows.all_users)
    ]


@post("/users/{name:str}/remove", status_code=200, opt={**ADMIN, ACT: "remove a user"})
async def remove_user(name: FromPath[str], app_state: NamedDependency[AppState]) -> UserRemoved:
    """Remove a user and end all sessions of it."""
    await app_state.write(partial(accounts.remove_user, name=name))
    return UserRemoved(name)


@get("/audit", opt=ADMIN)
async def list_acts(
    app_state: NamedDependency[AppState],
    before: Annotated[int, QueryParameter(ge=0, le=1 << 62)] = 1 << 62,
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_EVENTS)] = MAX_EVENTS,
) -> list[Act]:
    """What was done, by whom, and what came of it, with a number below ``before``, newest first."""
    rows = await app_state.read(lambda connection: audit_rows.newest(connection, before=before, limit=limit))
    return [Act(**vars(row)) for row in rows]


async def new_user(app_state: AppState, name: str, role: accounts.Role, password: str | None) -> str | None:
    """Add a user whose name and password are not checked yet; the token, if there is one.

    Raises:
        MalformedError: ``malformed``.
        ConflictError: ``name_taken``.
    """
    fault = accounts.name_fault(name) or (None if password is None else accounts.password_fault(password))
    if fault:
        raise MalformedError("malformed", fault)
    kept = None
    if password is not None:
        async with app_state.hashing:
            kept = await asyncio.to_thread(accounts.hash_password, password)
    return await app_state.write(
        partial(accounts.add_user, name=name, role=role, password=kept, now_s=app_state.clock())
    )


@post("/tokens", opt={ACT: "make an enrolment token"})
async def create_token(data: JSONBody[TokenRequest], app_state: NamedDependency[AppState]) -> TokenResponse:
    """Make a one-time enrolment token."""
    now_s = app_state.clock()
    token: str = await app_state.write(partial(auth.create_token, valid_s=data.valid_s, now_s=now_s))
    return TokenResponse(token, now_s + data.valid_s)


@get("/devices", opt=LOOK)
async def list_devices(app_state: NamedDependency[AppState]) -> list[DeviceSummary]:
    """All devices that ever enrolled, by name, and what may be expected of each."""
    return await app_state.read(
        lambda connection: devices_of(app_state.stores, connection, now_s=app_state.clock())
    )


@post("/devices/{name:str}/revoke", status_code=200, opt={ACT: "revoke a device"})
async def revoke_device(name: FromPath[str], app_state: NamedDependency[AppState]) -> DeviceChanged:
    """Refuse all further requests of a device, named by name or id."""
    device = await app_state.write(partial(auth.revoke, name=name, now_s=app_state.clock()))
    app_state.wake.set()
    return DeviceChanged(device.device_id, device.name)


@post("/devices/{name:str}/resume", status_code=200, opt={ACT: "resume a device"})
async def resume_device(name: FromPath[str], app_state: NamedDependency[AppState]) -> DeviceChanged:
    """Let the run that is going on ask a device again that it has set aside, named by name or id."""
    device = await app_state.write(partial(set_aside.resume, name=name, now_s=app_state.clock()))
    app_state.wake.set()
    return DeviceChanged(device.device_id, device.name)


@post("/runs", opt={ACT: "create a run"})
async def create_run(
    data: JSONBody[dict[str, Any]], request: Request[None, None, State], app_state: NamedDependency[AppState]
) -> RunCreated:
    """Queue a run; the body is a RunConfig, whose paths are paths on the coordinator's machine."""
    try:
        config = run_config(data)
        run_id = await asyncio.to_thread(runs.create_run, app_state.stores, config, now_s=app_state.clock())
    except EdgeError as error:
        raise UnusableError(type(error).__name__, str(error)) from error
    request.scope["state"][TOLD] = ("", run_id)
    app_state.wake.set()
    return RunCreated(run_id)


@get("/runs", opt=LOOK)
async def list_runs(app_state: NamedDependency[AppState]) -> list[RunSummary]:
    """All runs, oldest first, without their rounds."""
    return await app_state.read(
        lambda connection: [
            summarise(connection, runs.run_of(app_state.stores, row), with_rounds=False)
            for row in run_rows.all_runs(connection)
        ]
    )


@get("/runs/{run_id:str}", opt=LOOK)
async def show_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> RunSummary:
    """A run with its rounds; ``latest`` names the newest."""
    return await app_state.read(
        lambda connection: summarise(connection, runs.find_run(app_state.stores, connection, run_id))
    )


@get("/runs/{run_id:str}/events", opt=LOOK)
async def list_events(
    run_id: FromPath[str],
    app_state: NamedDependency[AppState],
    after: Annotated[int, QueryParameter(ge=0, le=1 << 62)] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_EVENTS)] = MAX_EVENTS,
) -> list[EventSummary]:
    """Events with an id above ``after``, oldest first."""
    return await app_state.read(
        lambda connection: events_of(
            connection, runs.find_run(app_state.stores, connection, run_id).run_id, after, limit
        )
    )


@get("/runs/{run_id:str}/slices", opt=LOOK)
async def fetch_slices(
    run_id: FromPath[str], app_state: NamedDependency[AppState], request: Request[None, None, State]
) -> Response[None] | Stream:
    """The run's slice values as safetensors: with ``average_from_round`` the mean, once there is one.

    These are the values that evaluations meet. Devices go on from the current ones, which ``state`` of a task names.
    """
    run = await app_state.read(lambda connection: runs.find_run(app_state.stores, connection, run_id))
    path = await asyncio.to_thread(app_state.stores.blobs.find, run.result_sha256)
    if path is None:
        raise NotFoundError("unknown_blob", f"the values of run {run.run_id} are missing on the disk")
    return serve_file(
        path,
        etag=f'"{run.result_sha256}"',
        asked=request.headers.get("range"),
        if_range=request.headers.get("if-range"),
    )


@post("/runs/{run_id:str}/stop", status_code=200, opt={ACT: "stop a run"})
async def stop_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> RunStopped:
    """Stop a run; its open round is abandoned, its values stay as the last commit left them."""
    run = await app_state.write(
        lambda connection: runs.stop_run(app_state.stores, connection, run_id, now_s=app_state.clock())
    )
    app_state.wake.set()
    return RunStopped(run.run_id, run.state)


@post("/releases", opt={ACT: "release a run's values"})
async def publish_release(
    data: JSONBody[ReleaseRequest],
    request: Request[None, None, State],
    app_state: NamedDependency[AppState],
) -> ReleaseSummary:
    """Publish values of a run; devices fetch them at their next check-in."""
    limits = Limits(data.lowest_accuracy, data.highest_loss)
    row = await app_state.write(
        lambda connection: releases.publish(
            app_state.stores,
            connection,
            data.run_id,
            data.round,
            limits,
            each_round=data.each_round,
            now_s=app_state.clock(),
        )
    )
    request.scope["state"][TOLD] = ("", f"release {row.number} of run {row.run_id}, after round {row.round}")
    return ReleaseSummary(**vars(row), devices=0)


@get("/releases", opt=LOOK)
async def list_releases(app_state: NamedDependency[AppState]) -> list[ReleaseSummary]:
    """All releases, oldest first, and how many devices have decided about each."""
    return await app_state.read(releases_of)


@post("/runs/{run_id:str}/pause", status_code=200, opt={ACT: "pause a run"})
async def pause_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> RunPaused:
    """Pause a run: no round opens and no device is asked; what devices work on already is still taken."""
    return await _pause(app_state, run_id, paused=True)


@post("/runs/{run_id:str}/resume", status_code=200, opt={ACT: "resume a run"})
async def resume_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> RunPaused:
    """Let a paused run go on."""
    return await _pause(app_state, run_id, paused=False)


@post("/runs/{run_id:str}/rollback", status_code=200, opt={ACT: "roll a run back"})
async def roll_back_run(
    run_id: FromPath[str],
    data: JSONBody[RollBackRequest],
    request: Request[None, None, State],
    app_state: NamedDependency[AppState],
) -> RunRolledBack:
    """Let a run stand again where it stood after one of its committed rounds; later rounds count no more."""
    request.scope["state"][TOLD] = ("", f"to round {data.to}")
    run, taken_back = await app_state.write(
        lambda connection: rollback.roll_back(
            app_state.stores, connection, run_id, data.to, now_s=app_state.clock()
        )
    )
    app_state.wake.set()
    return RunRolledBack(run.run_id, data.to, taken_back)


async def _pause(app_state: AppState, run_id: str, *, paused: bool) -> RunPaused:
    run = await app_state.write(
        lambda connection: runs.pause_run(
            app_state.stores, connection, run_id, paused=paused, now_s=app_state.clock()
        )
    )
    app_state.wake.set()
    return RunPaused(run.run_id, paused, run.paused != paused)


ROUTER = Router(
    "/v1/admin",
    route_handlers=[
        create_token,
        list_devices,
        revoke_device,
        resume_device,
        create_run,
        list_runs,
        show_run,
        list_events,
        fetch_slices,
        stop_run,
        publish_release,
        list_releases,
        pause_run,
        resume_run,
        roll_back_run,
        add_user,
        list_users,
        remove_user,
        list_acts,
    ],
    opt={ACCESS: Access.OPERATOR},
    tags=["admin"],
)
