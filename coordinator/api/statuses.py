"""Which HTTP status a refusal is answered with: the one table of them."""

from __future__ import annotations

from coordinator.refusals import (
    ConflictError,
    ForbiddenError,
    MalformedError,
    NotFoundError,
    RefusalError,
    TooLargeError,
    TooOftenError,
    TooSlowError,
    UnauthenticatedError,
    UnavailableError,
    UnusableError,
)

STATUS: dict[type[RefusalError], int] = {
    MalformedError: 400,
    UnauthenticatedError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    TooSlowError: 408,
    ConflictError: 409,
    TooLargeError: 413,
    UnusableError: 422,
    TooOftenError: 429,
    UnavailableError: 503,
}
#: How long whoever met trouble shall wait.
RETRY_AFTER_S = 10


def status_of(refusal: RefusalError) -> int:
    """The HTTP status of a refusal."""
    return STATUS[type(refusal)]


def headers_of(refusal: RefusalError) -> dict[str, str]:
    """The HTTP headers of a refusal beside those of its body."""
    return {"Retry-After": str(RETRY_AFTER_S)} if isinstance(refusal, UnavailableError) else {}
