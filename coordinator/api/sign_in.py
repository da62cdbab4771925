"""Signing in and out: a password or a token becomes a session, whose cookie no script reads and no other site sends."""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import Annotated, Any

from litestar import Request, Response, Router, get, post
from litestar.datastructures import Cookie, State
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from coordinator import accounts
from coordinator.api.access import ACCESS, ACT, PAGE, Access
from coordinator.api.app_state import AppState
from coordinator.api.middleware import COOKIE, FORM, SESSION, SIGN_IN_COOKIE
from coordinator.api.refused_pages import SIGN_IN
from coordinator.auth import ADMIN_TOKEN
from coordinator.dashboard.render import SECURITY_HEADERS, STATIC, render
from coordinator.refusals import NotFoundError, RefusalError, TooOftenError, UnauthenticatedError
from coordinator.storage import audit_rows, user_rows

AnyRequest = Request[None, None, State]
#: Longest names and secrets that are looked at.
MOST_NAME, MOST_SECRET = 64, 256
#: Failed attempts that the audit log keeps.
FAILURES_KEPT = 10_000


def page(template: str, request: AnyRequest, *, status: int = 200, **values: Any) -> Response[str]:
    """A page as an answer."""
    session = request.scope["state"].get(SESSION)
    text = render(template, session, **values)
    return Response(text, media_type="text/html", status_code=status, headers=dict(SECURITY_HEADERS))


def local_path(text: str) -> str:
    """A path of ours to go on to; the first page for anything else."""
    ours = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable()
    return text if ours else "/"


def go_to(path: str) -> Response[None]:
    """Send the browser to another page, which it gets anew."""
    return Response(None, status_code=303, headers={"Location": path, **SECURITY_HEADERS})


@get("/static/{name:str}", sync_to_thread=False)
def static(name: FromPath[str]) -> Response[str]:
    """The style sheet, the script and the icon of all pages."""
    if name not in STATIC:
        raise NotFoundError("unknown_path", "there is no such file")
    kind, text = STATIC[name]
    return Response(
        text, media_type=kind, headers={"Cache-Control": "max-age=300", "X-Content-Type-Options": "nosniff"}
    )


@get(SIGN_IN)
async def sign_in_page(
    request: AnyRequest, target: Annotated[str, QueryParameter(name="next", max_length=500)] = "/"
) -> Response[str]:
    """The form to sign in."""
    return _form(request, target=target)


@post(SIGN_IN, status_code=200)
async def sign_in(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[Any]:
    """Open a session for a password or a token."""
    fields = request.scope["state"][FORM].fields
    name, secret = fields.get("name", "").strip()[:MOST_NAME], fields.get("secret", "")
    target = local_path(fields.get("next", "/"))
    try:
        who, credential = await _check(app_state, name, secret)
    except RefusalError as refusal:
        await app_state.write(partial(_note_failure, at_s=app_state.clock(), name=name, code=refusal.code))
        status = 429 if isinstance(refusal, TooOftenError) else 401
        return _form(request, target=target, name=name, wrong=refusal.message, status=status)
    now_s = app_state.clock()

    def open_session(connection: Any) -> str:
        audit_id = audit_rows.begin(connection, at_s=now_s, who=who, act="sign in", subject="")
        audit_rows.end(connection, audit_id, outcome="done", detail="")
        return accounts.open_session(connection, who, credential, now_s=now_s)

    answer = go_to(target)
    answer.cookies = [
        _cookie(request, COOKIE, await app_state.write(open_session)),
        _cookie(request, SIGN_IN_COOKIE, "", max_age_s=0),
    ]
    return answer


@post("/sign-out", status_code=303, opt={ACT: "sign out"})
async def sign_out(request: AnyRequest, app_state: NamedDependency[AppState]) -> Response[None]:
    """End the session."""
    cookie = request.cookies.get(COOKIE, "")
    await app_state.write(partial(accounts.end_session, cookie=cookie))
    answer = go_to(SIGN_IN)
    answer.cookies = [_cookie(request, COOKIE, "", max_age_s=0)]
    return answer


async def _check(app_state: AppState, name: str, secret: str) -> tuple[str, str]:
    """Name of whoever signs in, and what the session hangs on.

    Raises:
        TooOftenError: ``too_often``.
        UnauthenticatedError: ``wrong_secret``.
    """
    if len(secret) > MOST_SECRET:
        raise _wrong()
    if not name:
        found = await app_state.read(
            lambda connection: accounts.find_by_token(connection, secret, app_state.admin_token)
        )
        if found is None:
            raise _wrong()
        return found.name, app_state.admin_token if found.name == ADMIN_TOKEN else accounts.sha256(secret)
    async with app_state.hashing:  # one at a time: each takes 32 MiB
        pause_s = app_state.attempts.pause_s(name, app_state.clock())
        if pause_s > 0:
            raise TooOftenError(
                "too_often",
                f"too many attempts for this name; wait {pause_s:.0f} s, or sign in with a token and an empty name",
            )
        user = await app_state.read(partial(user_rows.find, name=name))
        kept = user.password if user is not None and user.password else accounts.nobodys_password()
        right = await asyncio.to_thread(accounts.is_password, secret, kept)
        if user is None or not user.password or not right:
            app_state.attempts.fail(name, app_state.clock())
            raise _wrong()
    app_state.attempts.succeed(name)
    return name, kept


def _wrong() -> UnauthenticatedError:
    return UnauthenticatedError(
        "wrong_secret", "name, password or token is wrong; a token is given with an empty name"
    )


def _note_failure(connection: Any, *, at_s: float, name: str, code: str) -> None:
    audit_id = audit_rows.begin(connection, at_s=at_s, who="", act="sign in", subject=name)
    audit_rows.end(connection, audit_id, outcome=code, detail="")
    audit_rows.forget_strangers(connection, kept=FAILURES_KEPT)


def _form(
    request: AnyRequest,
    *,
    target: str,
    name: str = "",
    wrong: str = "",
    status: int = 200,
) -> Response[str]:
    word = secrets.token_urlsafe(24)
    answer = page(
        "sign_in.html",
        request,
        status=status,
        title="Sign in",
        sign_in_word=word,
        next=local_path(target),
        name=name,
        wrong=wrong,
    )
    answer.cookies = [_cookie(request, SIGN_IN_COOKIE, word)]
    return answer


def _cookie(request: AnyRequest, key: str, value: str, max_age_s: int = int(accounts.SESSION_S)) -> Cookie:
    return Cookie(
        key,
        value=value,
        max_age=max_age_s,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.scope["scheme"] == "https",
    )


ROUTERS = (
    Router("/", route_handlers=[static], opt={ACCESS: Access.ANYBODY}, include_in_schema=False),
    Router(
        "/",
        route_handlers=[sign_in_page, sign_in],
        opt={ACCESS: Access.SIGNING_IN, PAGE: True},
        include_in_schema=False,
    ),
    Router(
        "/",
        route_handlers=[sign_out],
        opt={ACCESS: Access.VIEWER, PAGE: True},
        include_in_schema=False,
    ),
)
