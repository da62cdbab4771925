"""What the dashboard's forms do: each is done whole or not at all, and stands in the audit log."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any
from urllib.parse import quote

import msgspec
from litestar import Request, Response, Router, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath

from coordinator import accounts, auth
from coordinator.accounts import ROLES
from coordinator.api import pages
from coordinator.api.access import ACCESS, ACT, MAX_BODY_BYTES, PAGE, Access
from coordinator.api.admin_api import ReleaseRequest, new_user
from coordinator.api.app_state import AppState
from coordinator.api.forms import Form
from coordinator.api.middleware import FORM, TOLD
from coordinator.api.pages import run_form_page, users_page
from coordinator.api.sign_in import go_to, page
from coordinator.dashboard import packages, run_form
from coordinator.refusals import MalformedError, RefusalError
from coordinator.rounds import releases, rollback, runs, set_aside
from coordinator.storage.release_rows import Limits
from edge_runtime.errors import EdgeError

AnyRequest = Request[None, None, State]
#: Largest upload of a package.
MAX_PACKAGE_BYTES = 16 << 30


def _form(request: AnyRequest) -> Form:
    form: Form = request.scope["state"][FORM]
    return form


def tell(request: AnyRequest, detail: str, code: str = "") -> None:
    """Say in the audit log what came of an act; a code says that it was refused."""
    request.scope["state"][TOLD] = (code, detail[:300])


@post("/runs/new", opt={ACT: "create a run"})
async def create_run(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[Any]:
    """Queue a run, or show the form again with what is wrong with it."""
    texts, errors, config = run_form.read_form(_form(request).fields)
    if config is not None:
        try:
            run_id = await asyncio.to_thread(
                runs.create_run, app_state.stores, config, now_s=app_state.clock()
            )
        except EdgeError as error:
            errors = {run_form.named_key(str(error)): str(error)}
        else:
            tell(request, run_id)
            app_state.wake.set()
            return go_to(f"/runs/{quote(run_id, safe='')}")
    tell(request, "; ".join(f"{path}: {error}" for path, error in errors.items()), "malformed")
    found = await asyncio.to_thread(packages.uploaded, app_state.stores)
    return run_form_page(request, found, texts, errors)


@post("/runs/new/file", opt={ACT: "read a run's file"}, status_code=200)
async def read_run_file(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[str]:
    """Show the form of a new run filled from a file; nothing is created."""
    found = await asyncio.to_thread(packages.uploaded, app_state.stores)
    files = list(_form(request).files.values())
    try:
        if not files:
            raise MalformedError("malformed", "no file was chosen")
        text = (await asyncio.to_thread(files[0].read_bytes)).decode("utf-8")
        texts, errors = run_form.read_text(text)
    except (EdgeError, RefusalError, UnicodeDecodeError) as error:
        said = "the file is not text" if isinstance(error, UnicodeDecodeError) else str(error)
        tell(request, said, "malformed")
        return run_form_page(request, found, {}, {"": said})
    return run_form_page(request, found, texts, errors)


@post("/runs/{run_id:str}/pause", opt={ACT: "pause a run"})
async def pause_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> Response[None]:
    """Open no more rounds of a run."""
    return await _pause(run_id, app_state, paused=True)


@post("/runs/{run_id:str}/resume", opt={ACT: "resume a run"})
async def resume_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> Response[None]:
    """Let a paused run go on."""
    return await _pause(run_id, app_state, paused=False)


async def _pause(run_id: str, app_state: AppState, *, paused: bool) -> Response[None]:
    await app_state.write(
        lambda connection: runs.pause_run(
            app_state.stores, connection, run_id, paused=paused, now_s=app_state.clock()
        )
    )
    app_state.wake.set()
    return go_to(_run(run_id))


@post("/runs/{run_id:str}/stop", opt={ACT: "stop a run"})
async def stop_run(run_id: FromPath[str], app_state: NamedDependency[AppState]) -> Response[None]:
    """Abort a run; its values stay as the last commit left them."""
    await app_state.write(
        lambda connection: runs.stop_run(app_state.stores, connection, run_id, now_s=app_state.clock())
    )
    app_state.wake.set()
    return go_to(_run(run_id))


@post("/runs/{run_id:str}/rollback", opt={ACT: "roll a run back"})
async def roll_back(
    request: AnyRequest, run_id: FromPath[str], app_state: NamedDependency[AppState]
) -> Response[None]:
    """Let a run stand again where it stood after a round."""
    to = _value(request, "to", int)
    if to is None:
        raise MalformedError("malformed", "name the round to go back to")
    tell(request, f"to round {to}")
    await app_state.write(
        lambda connection: rollback.roll_back(
            app_state.stores, connection, run_id, to, now_s=app_state.clock()
        )
    )
    app_state.wake.set()
    return go_to(_run(run_id))


@post("/runs/{run_id:str}/release", opt={ACT: "release a run's values"})
async def release(
    request: AnyRequest, run_id: FromPath[str], app_state: NamedDependency[AppState]
) -> Response[None]:
    """Publish values of a run for devices to use."""
    asked = ReleaseRequest(
        run_id=run_id,
        round=_value(request, "round", int),
        lowest_accuracy=_value(request, "lowest_accuracy", float),
        highest_loss=_value(request, "highest_loss", float),
        each_round=_form(request).fields.get("each_round") == "true",
    )
    try:
        asked = msgspec.convert(msgspec.to_builtins(asked), ReleaseRequest)
    except msgspec.ValidationError as error:
        raise MalformedError("malformed", f"the release cannot be made: {error}") from error
    row = await app_state.write(
        lambda connection: releases.publish(
            app_state.stores,
            connection,
            asked.run_id,
            asked.round,
            Limits(asked.lowest_accuracy, asked.highest_loss),
            each_round=asked.each_round,
            now_s=app_state.clock(),
        )
    )
    tell(request, f"release {row.number}, after round {row.round}")
    return go_to("/releases")


@post("/devices/{name:str}/revoke", opt={ACT: "revoke a device"})
async def revoke_device(name: FromPath[str], app_state: NamedDependency[AppState]) -> Response[None]:
    """Refuse all further requests of a device."""
    device = await app_state.write(partial(auth.revoke, name=name, now_s=app_state.clock()))
    app_state.wake.set()
    return go_to(f"/devices/{quote(device.device_id, safe='')}")


@post("/devices/{name:str}/resume", opt={ACT: "resume a device"})
async def resume_device(name: FromPath[str], app_state: NamedDependency[AppState]) -> Response[None]:
    """Let runs ask a device again that they have set aside."""
    device = await app_state.write(partial(set_aside.resume, name=name, now_s=app_state.clock()))
    app_state.wake.set()
    return go_to(f"/devices/{quote(device.device_id, safe='')}")


@post(
    "/packages",
    opt={ACCESS: Access.OPERATOR, ACT: "upload a package", MAX_BODY_BYTES: MAX_PACKAGE_BYTES},
    status_code=200,
)
async def upload_package(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[Any]:
    """Keep a package if its publisher has signed it, and all of it is there."""
    form = _form(request)
    key = form.fields.get("publisher_key", "").strip()
    try:
        kept = await asyncio.to_thread(packages.keep, app_state.stores, form.files, key)
    except EdgeError as error:
        tell(request, str(error), type(error).__name__)
        found = await asyncio.to_thread(packages.uploaded, app_state.stores)
        return page(
            "packages.html",
            request,
            status=422,
            title="Packages",
            packages=found,
            wrong=str(error),
            publisher_key=key,
        )
    tell(request, f"{kept.manifest.name}, sha256 {kept.sha256}")
    return go_to("/packages")


@post("/users", opt={ACT: "add a user"}, status_code=200)
async def add_user(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[str]:
    """Add a user with a password, or with a token that is shown once."""
    fields = _form(request).fields
    name, password = fields.get("name", "").strip(), fields.get("password", "")
    role = next((role for role in ROLES if role == fields.get("role")), None)
    tell(request, f"{name}, {role}")
    try:
        token = await _add(app_state, name, role, password)
    except RefusalError as error:
        tell(request, error.message, error.code)
        return await users_page(
            request, app_state, name=name[:64], role=role or "viewer", wrong=error.message
        )
    return await users_page(request, app_state, added=name, token=token or "")


async def _add(app_state: AppState, name: str, role: accounts.Role | None, password: str) -> str | None:
    """Add a user; the token, if there is one."""
    if role is None:
        raise MalformedError("malformed", f"a role is {', '.join(ROLES)}")
    return await new_user(app_state, name, role, password or None)


@post("/users/{name:str}/remove", opt={ACT: "remove a user"})
async def remove_user(name: FromPath[str], app_state: NamedDependency[AppState]) -> Response[None]:
    """Remove a user and end all its sessions."""
    await app_state.write(partial(accounts.remove_user, name=name))
    return go_to("/users")


def _value(request: AnyRequest, name: str, kind: type[Any]) -> Any:
    """A field's number; None where it is empty."""
    text = _form(request).fields.get(name, "").strip()
    if not text:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise MalformedError("malformed", f"{name} = {text[:60]!r} is no number") from error


def _run(run_id: str) -> str:
    return f"/runs/{quote(run_id, safe='')}"


#: Pages and forms by the right that they need. A path lies in one of them, whatever is asked of it.
ROUTERS = (
    Router(
        "/",
        route_handlers=[
            pages.overview,
            pages.run_list,
            pages.run,
            pages.compare,
            pages.devices,
            pages.device,
            pages.package_list,
            pages.release_list,
            upload_package,
        ],
        opt={ACCESS: Access.VIEWER, PAGE: True},
        include_in_schema=False,
    ),
    Router(
        "/",
        route_handlers=[
            pages.new_run,
            create_run,
            read_run_file,
            pause_run,
            resume_run,
            stop_run,
            roll_back,
            release,
            revoke_device,
            resume_device,
        ],
        opt={ACCESS: Access.OPERATOR, PAGE: True},
        include_in_schema=False,
    ),
    Router(
        "/",
        route_handlers=[pages.users, pages.audit, add_user, remove_user],
        opt={ACCESS: Access.ADMIN, PAGE: True},
        include_in_schema=False,
    ),
)
