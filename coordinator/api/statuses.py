"""Which HTTP status a refusal is answered with: the one table of them."""

from __future__ import annotations

from coordinator.refusals import (
    ConflictError,
    ForbiddenError,
    MalformedError,
    NotFoundError,
    RefusalError,
    TooLargeError,
    UnauthenticatedError,
    UnusableError,
)

STATUS: dict[type[RefusalError], int] = {
    MalformedError: 400,
    UnauthenticatedError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    ConflictError: 409,
    TooLargeError: 413,
    UnusableError: 422,
}


def status_of(refusal: RefusalError) -> int:
    """The HTTP status of a refusal."""
    return STATUS[type(refusal)]
