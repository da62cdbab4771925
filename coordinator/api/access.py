"""Who may call which route: every route states it, and a coordinator with a route that does not will not start.

A right is stated on a router, so it holds for every route in it, and for the answers to ``OPTIONS`` that the framework
adds. It is read behind the framework's own routing: what counts is where a request arrived, however it was spelt.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol

from litestar import Litestar
from litestar.routes import HTTPRoute

from coordinator.accounts import Role
from edge_runtime.protocol.messages import MAX_CONTROL_BYTES

#: Keys of a router's or a handler's ``opt``.
ACCESS = "access"
MAX_BODY_BYTES = "max_body_bytes"
#: True of pages: users are known by their session's cookie there, and refusals are pages.
PAGE = "page"
#: What a route does, for the audit log: every one that changes something at a user's word states it.
ACT = "act"

#: Enough for every request that an enrolment token comes in.
MAX_ENROLMENT_BYTES = 16 << 10


class Access(Enum):
    """Who may call a route."""

    #: Whoever reaches the port; there is no body.
    ANYBODY = "anybody"
    #: Whoever has a one-time token, which the handler uses up; until then a stranger, so bodies are small.
    TOKEN_HOLDER = "token_holder"  # noqa: S105 - a word, not a secret
    #: An enrolled device that is not revoked, by its signature.
    DEVICE = "device"
    #: A monitoring system, by a token that reads figures and nothing else; the admin token does, too.
    MONITOR = "monitor"
    #: Whoever signs in: a stranger until then, so bodies are small.
    SIGNING_IN = "signing in"
    #: A user, who may look at everything but users and the audit log.
    VIEWER = "viewer"
    #: A user who may change what devices and runs do.
    OPERATOR = "operator"
    #: A user who may do everything, or whoever has the token of the state folder.
    ADMIN = "admin"


#: Largest body where a handler does not state its own.
LIMITS: Mapping[Access, int] = {
    Access.ANYBODY: 0,
    Access.TOKEN_HOLDER: MAX_ENROLMENT_BYTES,
    Access.DEVICE: MAX_CONTROL_BYTES,
    Access.MONITOR: 0,
    Access.SIGNING_IN: MAX_ENROLMENT_BYTES,
    Access.VIEWER: MAX_CONTROL_BYTES,
    Access.OPERATOR: MAX_CONTROL_BYTES,
    Access.ADMIN: MAX_CONTROL_BYTES,
}
#: The role that a user needs for a route.
ROLES: Mapping[Access, Role] = {
    Access.VIEWER: "viewer",
    Access.OPERATOR: "operator",
    Access.ADMIN: "admin",
}
#: Methods that change nothing.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class RouteHandler(Protocol):
    """What is asked of a framework's route handler."""

    opt: dict[str, Any]


def access_of(handler: RouteHandler) -> Access:
    """Who may call a route; :class:`LookupError` if it does not say."""
    right: Access | None = handler.opt.get(ACCESS)
    if right is None:
        raise LookupError("the route states no access; put it into a router whose opt does")
    return right


def max_body_bytes_of(handler: RouteHandler) -> int:
    """The largest body that a route takes, in bytes."""
    return int(handler.opt.get(MAX_BODY_BYTES, LIMITS[access_of(handler)]))


def is_page(handler: RouteHandler) -> bool:
    """Whether a route is for people with a browser."""
    return bool(handler.opt.get(PAGE, False))


def act_of(handler: RouteHandler) -> str:
    """What a route that changes something does; :class:`LookupError` if it does not say."""
    act: str | None = handler.opt.get(ACT)
    if act is None:
        raise LookupError(
            "the route changes something at a user's word and states no act; put it into its opt"
        )
    return act


def stated_access(app: Litestar) -> dict[str, Access]:
    """Who may call each route, by method and path.

    Raises:
        LookupError: a route does not say, or is not plain HTTP; names it.
    """
    found = {}
    for route in app.routes:
        if not isinstance(route, HTTPRoute):  # a mounted application, a web socket
            raise LookupError(  # noqa: TRY004 - of the route, not of a type
                f"route {route.path} is no HTTP route; nothing decides who may call it"
            )
        for handler in route.route_handlers:
            for method in handler.http_methods:
                try:
                    found[f"{method} {route.path}"] = access_of(handler)
                    if access_of(handler) in ROLES and method not in SAFE_METHODS:
                        act_of(handler)
                except LookupError as error:
                    raise LookupError(f"{method} {route.path}: {error}") from error
    return found
