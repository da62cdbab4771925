"""The dashboard's pages: what there is to see, for every user."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from coordinator.api.app_state import AppState
from coordinator.api.sign_in import page
from coordinator.dashboard import fleet, packages, run_form, run_pages
from coordinator.dashboard.fleet import STATES
from coordinator.rounds.runs import find_run
from coordinator.rounds.summary import releases_of
from coordinator.storage import audit_rows, user_rows
from coordinator.storage.connection import Connection

AnyRequest = Request[None, None, State]
Before = Annotated[int, QueryParameter(ge=0, le=run_pages.END)]
Text = Annotated[str, QueryParameter(max_length=200)]
MOST_ACTS, MOST_RELEASES = 100, 200
#: What stands in the form of a new run before anything is typed.
PROPOSED: Mapping[str, str] = {
    "rounds": "20",
    "devices_per_round": "10",
    "seed": "0",
    "steps": "8",
    "batch_size": "8",
}


@get("/")
async def overview(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[str]:
    """The first page: runs with their curves, the fleet, memory, and what goes wrong."""
    counted = await app_state.fleet.get(
        app_state.clock(),
        lambda: app_state.read(
            lambda connection: {
                "classes": fleet.count_classes(app_state.stores, connection, now_s=app_state.clock()),
                "memory": fleet.memory_by_class(connection),
            }
        ),
    )

    def gather(connection: Connection) -> dict[str, Any]:
        heads = run_pages.run_list(app_state.stores, connection, limit=run_pages.MOST_FIRST)
        drawn = []
        for head in heads:
            run = find_run(app_state.stores, connection, head.run_id)
            drawn.append((head, run_pages.first_curve(connection, run)))
        return {"runs": drawn, "troubles": fleet.troubles_of(connection)}

    shown = await app_state.read(gather)
    totals = {
        state: sum(row.states[index] for row in counted["classes"]) for index, state in enumerate(STATES)
    }
    return page(
        "overview.html",
        request,
        title="Overview",
        devices=sum(totals.values()) - totals["revoked"],
        states=totals,
        state_names=list(STATES),
        now_s=app_state.clock(),
        **counted,
        **shown,
    )


@get("/runs")
async def run_list(
    request: AnyRequest, app_state: NamedDependency[AppState], before: Before = run_pages.END
) -> Response[str]:
    """All runs, newest first."""
    runs = await app_state.read(lambda connection: run_pages.run_list(app_state.stores, connection, before))
    older = runs[-1].position if len(runs) == run_pages.MOST_RUNS else None
    return page("runs.html", request, title="Runs", runs=runs, older=older)


@get("/runs/{run_id:str}")
async def run(
    request: AnyRequest,
    run_id: FromPath[str],
    app_state: NamedDependency[AppState],
    before: Before = run_pages.END,
) -> Response[str]:
    """A run: curves, rounds, what went wrong, events, configuration."""
    shown = await app_state.read(
        lambda connection: run_pages.run_page(app_state.stores, connection, run_id, before)
    )
    return page("run.html", request, title=shown["run"].run_id, now_s=app_state.clock(), **shown)


@get("/compare")
async def compare(
    request: AnyRequest,
    app_state: NamedDependency[AppState],
    run: Annotated[list[str] | None, QueryParameter(max_items=20)] = None,
) -> Response[str]:
    """Several runs side by side."""
    shown = await app_state.read(
        lambda connection: run_pages.comparison(app_state.stores, connection, run or [])
    )
    return page("compare.html", request, title="Compare runs", **shown)


@get("/fleet")
async def devices(
    request: AnyRequest,
    app_state: NamedDependency[AppState],
    wanted: Annotated[str, QueryParameter(name="state", max_length=200)] = "",
    device_class: Text = "",
    search: Text = "",
    page_number: Annotated[int, QueryParameter(name="page", ge=0, le=100_000)] = 0,
) -> Response[str]:
    """The devices, a page at a time."""
    shown = await app_state.read(
        lambda connection: fleet.fleet_page(
            app_state.stores,
            connection,
            state=wanted,
            device_class=device_class,
            search=search,
            page=page_number,
            now_s=app_state.clock(),
        )
    )
    return page("fleet.html", request, title="Fleet", now_s=app_state.clock(), **shown)


@get("/devices/{name:str}")
async def device(
    request: AnyRequest, name: FromPath[str], app_state: NamedDependency[AppState]
) -> Response[str]:
    """A device: what it holds, its last report, its history, its events."""
    shown = await app_state.read(
        lambda connection: fleet.device_page(app_state.stores, connection, name, now_s=app_state.clock())
    )
    return page("device.html", request, title=shown["device"].name, now_s=app_state.clock(), **shown)


@get("/packages")
async def package_list(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[str]:
    """The packages that were uploaded, and the form to upload another."""
    found = await asyncio.to_thread(packages.uploaded, app_state.stores)
    return page("packages.html", request, title="Packages", packages=found, wrong="", publisher_key="")


@get("/releases")
async def release_list(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[str]:
    """The releases, newest first."""
    found = (await app_state.read(releases_of))[::-1][:MOST_RELEASES]
    return page("releases.html", request, title="Releases", releases=found)


@get("/runs/new")
async def new_run(
    request: AnyRequest, app_state: NamedDependency[AppState], package: Text = "", like: Text = ""
) -> Response[str]:
    """The form of a new run: empty, for an uploaded package, or with another run's configuration."""
    found = await asyncio.to_thread(packages.uploaded, app_state.stores)
    texts: dict[str, str] = dict(PROPOSED)
    for each in found:
        if each.sha256 == package:
            texts |= {"package": str(each.folder), "publisher_key": each.publisher_key}
            texts |= {"name": each.manifest.name, "sequence_limit": str(each.manifest.sequence_limit)}
            texts |= {} if each.manifest.head is not None else {"train_head": "false"}
    if like:
        earlier = await app_state.read(lambda connection: find_run(app_state.stores, connection, like))
        texts = run_form.texts_of(earlier.config)
    return run_form_page(request, found, texts, {})


def run_form_page(
    request: AnyRequest, found: list[packages.Uploaded], texts: Mapping[str, str], errors: Mapping[str, str]
) -> Response[str]:
    """The form of a new run with what was typed, and what is wrong beside each field or, under no key, above all."""
    return page(
        "new_run.html",
        request,
        status=422 if errors else 200,
        title="New run",
        fields=run_form.fields(texts, errors),
        packages=found,
        wrong=len(errors),
        whole=errors.get("", ""),
    )


@get("/users")
async def users(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[str]:
    """The users, and the form to add one."""
    return await users_page(request, app_state)


async def users_page(
    request: AnyRequest,
    app_state: AppState,
    *,
    name: str = "",
    role: str = "viewer",
    wrong: str = "",
    added: str = "",
    token: str = "",
) -> Response[str]:
    """The page of users after something was done, or was not."""
    found = await app_state.read(user_rows.all_users)
    return page(
        "users.html",
        request,
        status=422 if wrong else 200,
        title="Users",
        users=found,
        name=name,
        role=role,
        wrong=wrong,
        added=added,
        token=token,
    )


@get("/audit")
async def audit(
    request: AnyRequest, app_state: NamedDependency[AppState], before: Before = run_pages.END
) -> Response[str]:
    """What was done, newest first."""
    acts = await app_state.read(
        lambda connection: audit_rows.newest(connection, before=before, limit=MOST_ACTS)
    )
    older = acts[-1].audit_id if len(acts) == MOST_ACTS else None
    return page("audit.html", request, title="Audit log", acts=acts, older=older)
