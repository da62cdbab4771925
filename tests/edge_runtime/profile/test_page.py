from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_runtime.figures import size
from edge_runtime.html.svg import NARROW, ticks
from edge_runtime.profile.charts import comparison_bars, timeline, waterfall
from edge_runtime.profile.document import Bin, Difference, Profile, TimelineSample, compare
from edge_runtime.profile.page import render_page
from tests.edge_runtime.html.pages import (
    Layout,
    Reader,
    assert_stands_alone,
    assert_well_formed,
    browse,
    lay_out,
    needs_browser,
    text_of,
)
from tests.edge_runtime.profile.profiles import FAILED, PROFILE, SHORT_ROWS, mib

BARE = replace(
    PROFILE, timeline=(), phases=(), tensors=(), what_if=(), growth=None, comparisons=(), step_s=None
)
BARE = replace(BARE, worst_case=None, edges=())
CASES: dict[str, tuple[Profile, Difference | None]] = {
    "passed": (PROFILE, None),
    "short rows": (SHORT_ROWS, None),
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


@each_case
def test_the_page_stands_alone(case: str) -> None:
    """The page names no address but SVG's namespace, holds no script, and forbids every outside resource."""
    assert_stands_alone(render_page(*CASES[case]))


@each_case
def test_the_page_is_well_formed(case: str) -> None:
    """Every tag is closed, every id is unique and every reference has its target."""
    assert_well_formed(render_page(*CASES[case]))


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
        if "scroll" in (attributes.get("class") or "").split():
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
    bar = re.search(r'<svg class="gauge".*?aria-label="([^"]*)"', render_page(profile))
    assert bar is not None
    assert size(profile.peak_bytes) in bar[1]
    assert ("charged by the kernel" in bar[1]) == (profile.charged_peak_bytes is not None)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(most=st.floats(0, 1e9), count=st.integers(1, 10))
def test_ticks_are_few_and_within_the_axis(most: float, count: int) -> None:
    """An axis starts at zero, does not run over its end, and is not crowded."""
    marks = ticks(most, count)
    assert marks[0] == 0
    assert marks[-1] <= most * (1 + 1e-9)
    assert len(marks) <= count + 2


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, int], Layout], list[str]]:
    """Every case on a telephone and on a desk, and what the browser complained about, from one browser."""
    pages = {case: render_page(*CASES[case]) for case in CASES}
    return lay_out(tmp_path_factory.mktemp("shown"), pages, (360, 1200))


@needs_browser
@each_case
def test_a_browser_shows_the_page_without_complaint(
    case: str, shown: tuple[dict[tuple[str, int], Layout], list[str]]
) -> None:
    """Chromium renders the page, finds the verdict in it and writes nothing to its console."""
    layouts, console = shown
    assert console == []
    assert f" {CASES[case][0].verdict}\n" in layouts[case, 1200].text


@needs_browser
def test_the_browser_would_complain_about_an_outside_resource(tmp_path: Path) -> None:
    """The page's own policy stops a picture from elsewhere, and the test above would see that."""
    page = render_page(PROFILE).replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>')
    _, console = browse(tmp_path, page)
    assert any("Content Security Policy" in line for line in console)


@needs_browser
@each_case
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_cut_off(
    case: str, width: int, shown: tuple[dict[tuple[str, int], Layout], list[str]]
) -> None:
    """On a telephone and on a desk no table is cut, nothing is scrolled sideways and no cap runs through a figure."""
    layout = shown[0][case, width]
    assert layout.width <= width
    assert layout.outside == []
    assert layout.struck == []


@needs_browser
def test_a_table_that_is_too_wide_would_be_seen(tmp_path: Path) -> None:
    """The probe of the test above names what does not fit the screen, and a figure that is struck through."""
    wide = render_page(PROFILE).replace("</main>", '<div style="width:400px">wide</div></main>')
    drawing = '<svg viewBox="0 0 340 40"><text class="number" x="9" y="20">97.3</text>'
    drawing += '<line class="cap" x1="15" x2="15" y1="0" y2="40"/></svg>'
    struck = render_page(PROFILE).replace("</main>", f"{drawing}</main>")
    layouts, _ = lay_out(tmp_path, {"wide": wide, "struck": struck}, (360,))
    assert "DIV.: wide" in layouts["wide", 360].outside
    assert layouts["struck", 360].struck == ["text.number: 97.3"]


def test_the_advice_can_be_typed() -> None:
    """The first sentence gives the cap to set and the smallest that works."""
    figure = re.search(r'<p class="figure">(.*?)</p>', render_page(PROFILE))
    assert figure is not None
    assert text_of(figure[1]) == (
        'You can set cap = "104M" for this work; the smallest cap that works is 88 MiB, as predicted.'
    )


def test_a_pass_says_what_it_rests_on() -> None:
    """Measured on short rows, the page tells the task's limits beside them, and that they need a larger cap."""
    text = text_of(render_page(SHORT_ROWS))
    assert "This PASS rests on what was measured: 8 examples a step, of at most 24 tokens." in text
    assert (
        "At the task's limits, 8 examples of 128 tokens, the plan predicts 126.3 MiB, which does not fit."
        in text
    )
    assert 'cap = "128M" is too small for this work. Set cap = "136M"' in text
    assert "What the verdict rests on" in text
    whole = text_of(render_page(PROFILE))
    assert (
        "This PASS was measured at the task's own limits: 8 examples a step, of at most 128 tokens." in whole
    )
    assert "What the verdict rests on" not in whole


@pytest.mark.parametrize(
    ("profile", "advice"),
    [
        (FAILED, "No cap is enough for long tasks of this work: memory grows with each step."),
        (replace(FAILED, growth=None), 'Do not set cap = "128M" for this work: the worker was ended there.'),
        (replace(FAILED, growth=None), 'Profile it again with cap = "192M".'),
        (
            replace(FAILED, growth=None, killed=False),
            'cap = "128M" is too small for this work. Set cap = "104M"',
        ),
    ],
)
def test_a_failed_run_is_not_advised_to_go_on(profile: Profile, advice: str) -> None:
    """A leak, a kill and a broken cap each have their own advice."""
    assert advice in text_of(render_page(profile))


def test_what_fits_begins_with_the_edge() -> None:
    """The largest sizes that fit and the first that do not stand open; the grid of sizes is folded."""
    page = render_page(PROFILE)
    section = page.partition("<h2>What fits</h2>")[2].partition("</section>")[0]
    edge, _, grid = section.partition("<details>")
    text = text_of(edge)
    for expected in ("examples of a step", "64", "128", "131.00", "all up to 128 fit", "draws of an example"):
        assert expected in text
    assert "▶" not in text
    assert "▶ fits, chosen" in text_of("<details>" + grid)


def test_technical_words_are_folded() -> None:
    """VmHWM and names of graphs stand in folded parts alone; what is open says the same in words."""
    page = re.sub(r"<details>.*?</details></section>", "", render_page(PROFILE), flags=re.DOTALL)
    assert "VmHWM" not in page
    assert "gelu_3" not in page
    whole = text_of(render_page(PROFILE))
    assert "VmHWM" in whole
    assert "an activation function's output" in whole
    assert "gelu_3" in whole
