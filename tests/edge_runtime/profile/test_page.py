from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.html.svg import NARROW, ticks
from edge_runtime.profile.charts import comparison_bars, gauge, timeline, waterfall
from edge_runtime.profile.document import Bin, Difference, Profile, TimelineSample, compare
from edge_runtime.profile.page import render_page
from tests.edge_runtime.profile.profiles import FAILED, PROFILE, mib

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

BARE = replace(
    PROFILE, timeline=(), phases=(), tensors=(), what_if=(), growth=None, comparisons=(), step_s=None
)
CASES: dict[str, tuple[Profile, Difference | None]] = {
    "passed": (PROFILE, None),
    "failed": (FAILED, compare(PROFILE, FAILED)),
    "bare": (replace(BARE, bins=(), charged_peak_bytes=None, enforced_by="none"), None),
    "long names": (
        replace(
            PROFILE,
            identity=replace(PROFILE.identity, package_name="p" * 120, device="d" * 120, command="c" * 1000),
            bins=tuple(replace(b, name="b" * 119 + str(i)) for i, b in enumerate(PROFILE.bins)),
            phases=(replace(PROFILE.phases[0], name="h" * 120),),
            enforcement_note="n" * 1000,
        ),
        None,
    ),
    "restless phases": (
        replace(
            PROFILE,
            timeline=tuple(
                TimelineSample(i * 5e-324, f"a long phase name {i % 7}", mib(300), mib(200), mib(140))
                for i in range(900)
            ),
        ),
        None,
    ),
    "overlapping bins": (replace(PROFILE, bins=(Bin("all", mib(200), mib(300)),)), None),
}
each_case = pytest.mark.parametrize("case", CASES)


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


@each_case
def test_the_page_stands_alone(case: str) -> None:
    """The page names no address but SVG's namespace, holds no script, and forbids every outside resource."""
    page = render_page(*CASES[case])
    assert set(re.findall(r"[a-z]+://[^\"' <]*", page)) <= {"http://www.w3.org/2000/svg"}
    tags = Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert not {name for _, attributes in tags for name in attributes} & {"src", "href"}
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


@each_case
def test_the_page_is_well_formed(case: str) -> None:
    """Every tag is closed, every id is unique and every reference has its target."""
    reader = Reader(render_page(*CASES[case]))
    assert reader.open == []
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)


@each_case
def test_readers_without_eyes_or_mouse_get_the_whole_page(case: str) -> None:
    """Headings go down by one, tables have captions and named columns, drawings are named or hidden."""
    page = render_page(*CASES[case])
    tags = Reader(page).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert page.count("<table") == page.count("<caption")
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    for tag, attributes in tags:
        if tag == "svg":
            assert attributes.keys() & {"aria-labelledby", "aria-label", "aria-hidden"}
        if attributes.get("class") == "scroll" and "role" in attributes:
            assert attributes["tabindex"] == "0"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=60))
def test_every_text_is_escaped(text: str) -> None:
    """No text of a report can become part of the page's structure."""
    tags = [tag for tag, _ in Reader(render_page(_with_text("harmless"), _difference("harmless"))).tags]
    for hostile in (text, f'"><script>{text}</script><b onload="'):
        page = render_page(_with_text(hostile), _difference(hostile))
        assert [tag for tag, _ in Reader(page).tags] == tags
        assert "<script" not in page
        assert "<b " not in page


def _with_text(text: str) -> Profile:
    fields = ("device", "kernel", "cpu", "runtime_version", "engine", "package_name", "arithmetic")
    return replace(
        PROFILE,
        identity=replace(PROFILE.identity, command="run", **dict.fromkeys(fields, text)),
        work=replace(PROFILE.work, slices=(text,), gave_up=(text,)),
        enforcement_note=text,
        bins=tuple(replace(b, name=f"{text}{i}", note=text) for i, b in enumerate(PROFILE.bins)),
        timeline=tuple(replace(s, phase=text) for s in PROFILE.timeline[:40]),
        phases=tuple(replace(p, name=f"{text}{i}") for i, p in enumerate(PROFILE.phases)),
        tensors=tuple(
            replace(t, name=text, program=text, operator=text, shape=text) for t in PROFILE.tensors
        ),
        comparisons=tuple(replace(c, name=text, note=text) for c in PROFILE.comparisons),
        measuring=replace(PROFILE.measuring, note=text),
    )


def _difference(text: str) -> Difference:
    change = compare(PROFILE, PROFILE)
    return replace(change, notes=(text,), bins=tuple(replace(b, name=text) for b in change.bins))


def test_the_page_says_what_the_report_found() -> None:
    """Verdict, second figure, owner of the peak, chosen option and the way to repeat it are on the page."""
    text = Reader(render_page(PROFILE)).text.replace("\u00a0", " ")
    for expected in (
        "✓ PASS",
        "Measured 97.3 MiB of a cap of 128.0 MiB, 24 % headroom",
        "The kernel charged 84.1 MiB",
        "owns the peak",
        "▶ fits, chosen",
        "does not fit",
        "No leak:",
        "560 samples took 41 ms",
        PROFILE.identity.command,
    ):
        assert expected in text


def test_a_failed_page_gives_every_reason() -> None:
    """A failed run says why, and a comparison what grew."""
    text = Reader(render_page(FAILED, compare(PROFILE, FAILED))).text.replace("\u00a0", " ")
    for expected in ("✕ FAIL", "The kernel ended the worker", "3.40 MiB over the cap", "REGRESSED:", "grew"):
        assert expected in text


@pytest.mark.parametrize("width", [880, 340])
@each_case
def test_drawings_stay_inside_their_frame(case: str, width: int) -> None:
    """No bar, line or label anchor of a drawing lies outside its view box."""
    profile, _ = CASES[case]
    assert width != NARROW
    for draw in (waterfall, timeline, comparison_bars):
        drawing = draw(profile, width)
        if not drawing:
            continue
        root = ET.fromstring(drawing)  # noqa: S314 - made by ourselves a line above
        _, _, wide, high = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            place = element.attrib
            for x in (place.get(name) for name in ("x", "x1", "x2", "cx")):
                assert x is None or -0.5 <= float(x) <= wide + 0.5
            for y in (place.get(name) for name in ("y", "y1", "y2", "cy")):
                assert y is None or -0.5 <= float(y) <= high + 0.5
            if element.tag.endswith("rect"):
                assert float(place["x"]) + float(place["width"]) <= wide + 0.5


@each_case
def test_the_gauge_shows_all_figures_in_words_too(case: str) -> None:
    """The bar at the top has its figures as its label."""
    profile, _ = CASES[case]
    assert ("charged by the kernel" in gauge(profile)) == (profile.charged_peak_bytes is not None)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(most=st.floats(0, 1e9), count=st.integers(1, 10))
def test_ticks_are_few_and_within_the_axis(most: float, count: int) -> None:
    """An axis starts at zero, does not run over its end, and is not crowded."""
    marks = ticks(most, count)
    assert marks[0] == 0
    assert marks[-1] <= most * (1 + 1e-9)
    assert len(marks) <= count + 2


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


@needs_browser
@each_case
def test_a_browser_shows_the_page_without_complaint(case: str, tmp_path: Path) -> None:
    """Chromium renders the page, finds the verdict in it and writes nothing to its console."""
    profile, difference = CASES[case]
    shown, console = browse(tmp_path, render_page(profile, difference))
    assert console == []
    assert f" {profile.verdict}</p>" in shown


@needs_browser
def test_the_browser_would_complain_about_an_outside_resource(tmp_path: Path) -> None:
    """The page's own policy stops a picture from elsewhere, and the test above would see that."""
    page = render_page(PROFILE).replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>')
    _, console = browse(tmp_path, page)
    assert any("Content Security Policy" in line for line in console)


@needs_browser
@each_case
def test_the_page_fits_a_telephone(case: str, tmp_path: Path) -> None:
    """At 390 pixels nothing but the tables' own boxes has to be scrolled sideways."""
    page = render_page(*CASES[case]).replace("default-src 'none';", "script-src 'unsafe-inline';")
    probe = "document.body.dataset.wide = document.documentElement.scrollWidth + '/' + innerWidth"
    shown, _ = browse(tmp_path, page.replace("</body>", f"<script>{probe}</script></body>"), width=390)
    found = re.search(r'data-wide="(\d+)/(\d+)"', shown)
    assert found is not None
    assert int(found[1]) <= int(found[2])
    assert int(found[2]) <= 500
