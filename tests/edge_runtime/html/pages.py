"""Reading a page as a parser does, and looking at it as a browser does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

#: Size of the largest page that may be written.
MOST_PAGE_BYTES = 200_000
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


class Reader(HTMLParser):
    """Collects a page's tags and attributes, and whether every tag is closed in order."""

    VOID = ("meta", "!doctype", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(page: str) -> str:
    """The page's text with plain spaces."""
    return Reader(page).text.replace("\u00a0", " ")


def assert_stands_alone(page: str) -> None:
    """The page names no address but SVG's namespace, holds no script, forbids outside resources and is small."""
    assert set(re.findall(r"[a-z]+://[^\"' <]*", page)) <= {"http://www.w3.org/2000/svg"}
    tags = Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert not {name for _, attributes in tags for name in attributes} & {"src", "href"}
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert len(page.encode()) < MOST_PAGE_BYTES


def assert_well_formed(page: str) -> None:
    """Every tag is closed, every id is unique and every reference has its target."""
    reader = Reader(page)
    assert reader.open == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)


def browse(folder: Path, page: str, width: int = 1280) -> tuple[str, list[str]]:
    """The rendered document and the console's lines."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        (folder / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@dataclass(frozen=True)
class Layout:
    """How a page lies on a screen.

    Attributes:
        text: all text that is shown.
        width: width that the whole page takes, in pixels.
        outside: elements that reach beyond the screen, or hold more than they show.
        struck: figures of drawings that a cap's line runs through.
    """

    text: str
    width: int
    outside: list[str]
    struck: list[str]


#: Opens every fold of every page, then looks where things lie.
_PROBE = """
const name = e => e.tagName + "." + (e.getAttribute("class") || "") + ": " + e.textContent.trim().slice(0, 60);
const overlap = (a, b) => b.left < a.right && b.right > a.left && b.top < a.bottom && b.bottom > a.top;
const look = frame => {
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(fold => fold.open = true);
  const shown = [...page.body.querySelectorAll("*")].filter(e => e.getClientRects().length);
  const outside = shown.filter(e => e.getBoundingClientRect().right > frame.clientWidth + 0.5
    || (getComputedStyle(e).overflowX != "visible" && e.scrollWidth > e.clientWidth + 1));
  const struck = shown.filter(e => e.matches("svg text.number")).filter(text =>
    [...text.ownerSVGElement.querySelectorAll("line.cap")].some(line =>
      overlap(text.getBoundingClientRect(), line.getBoundingClientRect())));
  return {text: page.body.innerText, width: page.documentElement.scrollWidth,
    outside: outside.map(name), struck: struck.map(name)};
};
document.body.dataset.layouts = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
"""


def lay_out(
    folder: Path, pages: dict[str, str], widths: tuple[int, ...]
) -> tuple[dict[tuple[str, int], Layout], list[str]]:
    """Show pages on screens of several widths, with all folds open: how each lies, and the console's lines.

    A window cannot be narrower than Chromium allows (500 pixels), so each page stands in a frame.
    """
    places = [(name, width) for name in pages for width in widths]
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(pages[name])}"></iframe>'
        for name, width in places
    )
    script = f'<script>addEventListener("load", () => {{{_PROBE}}})</script>'
    shown, console = browse(folder, f"<!doctype html><body style='margin:0'>{frames}{script}</body>")
    found = re.search(r'data-layouts="([^"]*)"', shown)
    assert found is not None
    layouts = [Layout(**layout) for layout in json.loads(unescape(found[1]))]
    return dict(zip(places, layouts, strict=True)), console
