"""A clear no to a request: status, stable code, message for people. Raised anywhere, answered once."""

from __future__ import annotations


class RefusalError(Exception):
    """The request is refused and nothing has changed; ``docs/protocol.md`` lists the codes.

    Args:
        status: the HTTP status, 4xx.
        code: stable and machine-readable.
        message: what happened, which limit was met, what to do; never a data value.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
