"""Templates to pages. A page needs nothing but itself, the style sheet and the script of this package."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from coordinator.accounts import ROLES, Session
from edge_runtime.figures import duration, plural, size
from edge_runtime.html.style import STYLE

FOLDER = Path(__file__).parent
#: Nothing from elsewhere, no inline script or style, no frame around a page, nothing kept by caches.
SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self';"
    " img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
#: What is served beside pages, by name: kind and text.
STATIC: Mapping[str, tuple[str, str]] = {
    "style.css": ("text/css", f"{STYLE}\n{(FOLDER / 'static/dashboard.css').read_text('utf-8')}"),
    "live.js": ("text/javascript", (FOLDER / "static/live.js").read_text("utf-8")),
    "icon.svg": ("image/svg+xml", (FOLDER / "static/icon.svg").read_text("utf-8")),
}


def moment(seconds: float | None) -> str:
    """A moment in words; a dash for none."""
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def age(seconds: float | None, now_s: float) -> str:
    """How long ago a moment was, in its largest unit."""
    if seconds is None:
        return "never"
    passed = max(0.0, now_s - seconds)
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length_s:
            return f"{passed / length_s:.0f} {unit} ago"
    return f"{passed:.0f} s ago"


#: What every form of a session carries.
_CSRF = Markup('<input type="hidden" name="csrf" value="{}">')


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "size": lambda count: "–" if count is None else size(count),
        "duration": lambda seconds: "–" if seconds is None else duration(seconds),
        "moment": moment,
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        "number": lambda value: "–" if value is None else f"{value:.4g}",
        "count": lambda value: f"{value:,}",
        "plural": plural,
    }
    return made


ENVIRONMENT = _environment()


def render(template: str, session: Session | None, **values: Any) -> str:
    """A page.

    Args:
        template: name of the template.
        session: session of whoever looks; None for somebody who is not signed in.
        values: what the template shows; ``title`` among them.
    """
    now_s = values.setdefault("now_s", time.time())
    values.setdefault("notice", "")
    return ENVIRONMENT.get_template(template).render(
        session=session,
        csrf=lambda: (
            ""
            if session is None
            else Markup('<input type="hidden" name="csrf" value="{}">').format(session.csrf)
        ),
        roles=ROLES,
        age=lambda seconds: age(seconds, now_s),
        **values,
    )
