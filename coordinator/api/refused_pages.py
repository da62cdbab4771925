"""Refusals as pages: who is not signed in is asked to, others get one line that says what to do."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from coordinator.accounts import Session
from coordinator.dashboard.render import SECURITY_HEADERS, render
from coordinator.refusals import RefusalError

SIGN_IN = "/sign-in"


def refused_page(
    scope: Any, status: int, refusal: RefusalError, session: Session | None
) -> tuple[int, str, bytes, dict[str, str]]:
    """Status, kind, body and headers of the answer."""
    if refusal.code == "signed_out":
        path = scope["path"] if scope["method"] == "GET" else "/"
        return 303, "text/plain", b"", {"Location": f"{SIGN_IN}?next={quote(path, safe='/')}"}
    page = render("refused.html", session, title="Not done", code=refusal.code, message=refusal.message)
    return status, "text/html; charset=utf-8", page.encode(), dict(SECURITY_HEADERS)
