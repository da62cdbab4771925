"""A clear no to a request: what kind of no, a stable code, a message for people. Raised anywhere, answered in api/.

RefusalError
├── MalformedError         the request is not one that the protocol has
├── UnauthenticatedError   who asks is not known
├── ForbiddenError         who asks is known, and may not
├── NotFoundError          what the request names is not here
├── ConflictError          the request does not fit how things stand
├── TooLargeError          the body is over its limit
├── TooSlowError           the body dawdles
├── TooOftenError          it was tried too often in a short time
├── UnusableError          what the request brings cannot be used
└── UnavailableError       this machine is in trouble that passes: the same request may be sent again
"""

from __future__ import annotations


class RefusalError(Exception):
    """The request is refused and nothing has changed; ``docs/protocol.md`` lists the codes. Raise one of its kinds.

    Args:
        code: word for programs; it never changes.
        message: text for people: what happened, which limit was met, what to do. It never holds a data value.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class MalformedError(RefusalError):
    """The request is not one that the protocol has."""


class UnauthenticatedError(RefusalError):
    """Who asks is not known."""


class ForbiddenError(RefusalError):
    """Who asks is known, and may not."""


class NotFoundError(RefusalError):
    """What the request names is not here."""


class ConflictError(RefusalError):
    """The request does not fit how things stand."""


class TooLargeError(RefusalError):
    """The body is over its limit."""


class TooSlowError(RefusalError):
    """The body dawdles."""


class TooOftenError(RefusalError):
    """It was tried too often in a short time."""


class UnavailableError(RefusalError):
    """This machine is in trouble that passes: the same request may be sent again later."""


class UnusableError(RefusalError):
    """What the request brings cannot be used."""
