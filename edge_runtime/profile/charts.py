"""The memory-budget report's drawings: plain SVG text, coloured by the page's style sheet.

Each drawing is made for one width in pixels; below :data:`edge_runtime.html.svg.NARROW` names stand above their bars
instead of beside them. A pattern or a word repeats whatever colour says: predicted and file-backed memory are hatched.
Every drawing has a title and a description, and the page repeats its figures as text or table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from edge_runtime.figures import MIB, column_mib, duration, size
from edge_runtime.html.svg import NARROW, SHORTEST, points_text, svg, svg_text, ticks
from edge_runtime.profile.document import Profile, TimelineSample, thin

#: Largest number of points that can be told apart on a screen.
_POINTS = 480
_LETTER = 6.9  # pixels a letter of a label takes, on the wide side
#: A timeline whose first sample lies within this share of its length is drawn from 0 on.
_AT_ONCE = 0.02
_LABEL_ROWS = 2  # phases that come too thick for these rows keep their band and lose their name
_ROW, _BAR, _GAP = 38, 11, 3


def waterfall(profile: Profile, width: int) -> str:
    """Predicted and measured bins side by side, each starting where the one above ended."""
    narrow = width < NARROW
    left, right, row_height, head = (2, 2, _ROW + 20, 34) if narrow else (168, 150, _ROW, 34)
    rows = profile.ledger
    height = head + row_height * (len(rows) + 1) + 24
    predicted = [row.predicted_bytes for row in rows]
    measured = [row.measured_bytes or 0 for row in rows]
    # Where bins overlap, the stairs reach above the peak before they come back.
    most = max(profile.cap_bytes, *accumulate(predicted), *accumulate(measured))
    scale = (width - left - right) / (most * 1.02)
    first = head + (24 if narrow else 7)
    total = head + len(rows) * row_height
    bars = [
        *_stairs("predicted", predicted, left, scale, first, row_height),
        *_stairs("measured", measured, left, scale, first + _BAR + _GAP, row_height),
        f'<line class="sum" x1="0" x2="{width}" y1="{total}" y2="{total}"/>',
    ]
    texts = (
        []
        if narrow
        else [
            svg_text(width - 78, 18, "predicted", "muted end"),
            svg_text(width, 18, "measured", "muted end"),
        ]
    )
    for index, row in enumerate(rows):
        top = head + index * row_height
        texts += _row_texts(row.name, row.predicted_bytes, row.measured_bytes, width, top)
    texts += _row_texts("peak", profile.predicted_peak_bytes, profile.peak_bytes, width, total, "strong")
    spans = _spans(width, head, row_height, len(rows) + 1, _BAR + _GAP + _BAR)
    parts = [
        *_grid_down(most, scale, left, spans),
        *bars,
        *_cap_down(profile.cap_bytes, left + profile.cap_bytes * scale, spans, head - 14, width - right),
        *texts,
    ]
    described = "; ".join(
        f"{row.name}: predicted {size(row.predicted_bytes)}, measured "
        f"{'not told apart' if row.measured_bytes is None else size(row.measured_bytes)}"
        for row in rows
    )
    return svg("waterfall", width, height, "Predicted against measured memory, bin by bin", described, parts)


def _stairs(
    kind: str, lengths: Sequence[int], left: float, scale: float, y: float, row_height: int
) -> Iterator[str]:
    """A bar for each length, the last of which is the unexplained rest; then one bar for their sum."""
    end = 0
    for index, length in enumerate(lengths):
        start, end = end, end + length
        if length:
            rest = " rest" if index == len(lengths) - 1 else ""
            yield _bar(kind + rest, left + min(start, end) * scale, abs(length) * scale, y)
        x = left + end * scale
        yield (
            f'<line class="step" x1="{x:.1f}" x2="{x:.1f}" y1="{y + (_BAR if length else 0):.1f}" '
            f'y2="{y + row_height:.1f}"/>'
        )
        y += row_height
    yield _bar(kind, left, end * scale, y)


def _bar(kind: str, x: float, length: float, y: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(1.0, length):.1f}" height="{_BAR}"/>'


def _row_texts(
    name: str, predicted: int, measured: int | None, width: int, top: float, kind: str = ""
) -> list[str]:
    figures = (column_mib(predicted), column_mib(measured))
    if width < NARROW:
        return [
            *_plate(0, top + 17, _fitted(name, width - 120), kind),
            *_plate(width, top + 17, " · ".join(figures), f"number end {kind}"),
        ]
    return [
        svg_text(0, top + 24, _fitted(name, 160), kind),
        svg_text(width - 78, top + 24, figures[0], f"number end muted {kind}"),
        svg_text(width, top + 24, figures[1], f"number end {kind}"),
    ]


def _spans(width: int, head: float, row_height: int, rows: int, bars: int) -> list[tuple[float, float]]:
    """Where vertical lines are drawn: from head to foot, but on a narrow drawing beside the bars alone.

    There names and figures have lines of their own above the bars, and nothing may run through them.
    """
    if width >= NARROW:
        return [(head, head + rows * row_height + 2)]
    tops = [head + row * row_height + 24 for row in range(rows)]
    return [(top - 2, top + bars + 2) for top in tops]


def _grid_down(most: int, scale: float, left: float, spans: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Vertical lines at round numbers of MiB, with the numbers at the foot."""
    bottom = spans[-1][1]
    yield svg_text(
        left if left < 10 else left - 14,
        bottom + 16,
        "MiB",
        "muted small" if left < 10 else "muted small end",
    )
    for tick in ticks(most / MIB, 5)[1 if left < 10 else 0 :]:
        x = left + tick * MIB * scale
        for top, foot in spans:
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{foot}"/>'
        yield svg_text(x, bottom + 16, f"{tick:g}", "muted small middle")


def _cap_down(
    cap: int, x: float, spans: Sequence[tuple[float, float]], label: float, last: float
) -> list[str]:
    side = "end" if x > last - 90 else "middle"
    return [
        *(f'<line class="cap" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{foot}"/>' for top, foot in spans),
        svg_text(min(x + 1, last), label, f"cap {size(cap)}", f"cap-text {side}"),
    ]


def timeline(profile: Profile, width: int) -> str:
    """Anonymous and file-backed memory over time, phase by phase, with the cap and the peak."""
    if len(profile.timeline) < 2:
        return ""
    samples = thin(profile.timeline, _POINTS)
    plane = _plane(profile, samples, width)
    runs = _phase_runs(samples)
    private = [(plane.x(s.seconds), plane.y(s.anonymous_bytes)) for s in samples]
    stacked = [(plane.x(s.seconds), plane.y(s.anonymous_bytes + s.file_bytes)) for s in samples]
    resident = [(plane.x(s.seconds), plane.y(s.resident_bytes)) for s in samples]
    floor = [(plane.right, plane.bottom), (plane.left, plane.bottom)]
    parts = [
        *_phase_bands(runs, plane),
        *_axes(plane, width),
        f'<polygon class="anonymous" points="{points_text(private + floor)}"/>',
        f'<polygon class="file" points="{points_text(stacked + private[::-1])}"/>',
        f'<polyline class="resident" points="{points_text(resident)}"/>',
        *_phase_labels(runs, plane),
        *_levels(profile, samples, plane),
    ]
    described = (
        f"Resident memory over {duration(plane.last - plane.first)} against a cap of "
        f"{size(profile.cap_bytes)}, peak {size(profile.peak_bytes)}. Phases in order: "
        f"{', '.join(dict.fromkeys(name for name, _, _ in runs))}"
    )
    return svg("timeline", width, plane.bottom + 40, "Memory over time, by phase", described, parts)


@dataclass(frozen=True)
class _Plane:
    """Where seconds and bytes lie on the drawing.

    Attributes:
        left: x of the first second, in pixels.
        right: x of the last second, in pixels.
        top: y of ``most`` bytes, in pixels.
        bottom: y of no bytes, in pixels.
        first: first second.
        last: last second.
        most: number of bytes at the top.
    """

    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float
    most: float

    def x(self, seconds: float) -> float:
        return self.left + (seconds - self.first) * self.across

    def y(self, count: float) -> float:
        return self.bottom - count * (self.bottom - self.top) / self.most

    @property
    def across(self) -> float:
        """Pixels of one second."""
        return (self.right - self.left) / max(self.last - self.first, SHORTEST)


def _plane(profile: Profile, samples: Sequence[TimelineSample], width: int) -> _Plane:
    highest = max(max(s.resident_bytes, s.anonymous_bytes + s.file_bytes) for s in samples)
    top = 14 + 17 * _LABEL_ROWS
    first, last = samples[0].seconds, samples[-1].seconds
    return _Plane(
        left=40,
        right=width - 6,
        top=top,
        bottom=top + (220 if width < NARROW else 270),
        first=0.0 if first < _AT_ONCE * last else first,
        last=last,
        most=1.1 * max(profile.cap_bytes, profile.peak_bytes, highest),
    )


def _axes(plane: _Plane, width: int) -> Iterator[str]:
    yield svg_text(0, 13, "MiB", "muted small")
    for tick in ticks(plane.most / MIB, 5):
        level = plane.y(tick * MIB)
        yield f'<line class="grid" x1="{plane.left}" x2="{plane.right}" y1="{level:.1f}" y2="{level:.1f}"/>'
        yield svg_text(plane.left - 8, level + 4, f"{tick:g}", "muted small end")
    for tick in ticks(plane.last - plane.first, 4 if width < NARROW else 8):
        yield svg_text(plane.x(plane.first + tick), plane.bottom + 17, f"{tick:g}", "muted small middle")
    unit = f"seconds after {plane.first:.3g} s" if plane.first else "seconds"
    yield svg_text((plane.left + plane.right) / 2, plane.bottom + 36, unit, "muted small middle")


def _phase_runs(samples: Sequence[TimelineSample]) -> list[tuple[str, float, float]]:
    """Stretches of one phase as (name, from, until); each lasts until the next begins."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(samples), 1) if a.phase != b.phase)]
    ends = [*starts[1:], len(samples) - 1]
    return [
        (samples[a].phase, samples[a].seconds, samples[b].seconds) for a, b in zip(starts, ends, strict=True)
    ]


def _phase_bands(runs: Sequence[tuple[str, float, float]], plane: _Plane) -> Iterator[str]:
    for index, (_, since, until) in enumerate(runs):
        kind = "band" if index % 2 else "band other"
        yield (
            f'<rect class="{kind}" x="{plane.x(since):.1f}" y="{plane.top}" '
            f'width="{(until - since) * plane.across:.1f}" height="{plane.bottom - plane.top}"/>'
        )


def _phase_labels(runs: Sequence[tuple[str, float, float]], plane: _Plane) -> Iterator[str]:
    """Names above their bands, the lowest row first, in as many rows as keep them apart."""
    ends = [0.0] * _LABEL_ROWS
    for name, since, _ in runs:
        shown = _fitted(name, 120)
        mark = plane.x(since)
        x = max(plane.left, min(mark, plane.right - _LETTER * len(shown)))
        row = next((i for i, end in enumerate(ends) if end < x), None)
        if row is None:
            continue
        ends[row] = x + _LETTER * len(shown) + 10
        y = plane.top - 11 - 17 * row
        yield (
            f'<line class="tick" x1="{mark:.1f}" x2="{mark:.1f}" y1="{plane.top - 6}" y2="{plane.top - 1}"/>'
        )
        yield svg_text(x, y, shown, "phase")


def _levels(profile: Profile, samples: Sequence[TimelineSample], plane: _Plane) -> Iterator[str]:
    """The cap, the peak and the highest sample."""
    highest = max(samples, key=lambda sample: sample.resident_bytes)
    x, y = plane.x(highest.seconds), plane.y(highest.resident_bytes)
    cap, mark = plane.y(profile.cap_bytes), plane.y(profile.peak_bytes)
    for kind, level in (("mark", mark), ("cap", cap)):
        yield (
            f'<line class="{kind}" x1="{plane.left}" x2="{plane.right}" y1="{level:.1f}" y2="{level:.1f}"/>'
        )
    late = x > (plane.left + plane.right) / 2
    # The cap's name goes where the peak is not, and below its line if the mark would strike it through.
    yield svg_text(
        plane.left + 6 if late else plane.right - 6,
        cap + 16 if 0 <= cap - mark < 20 else cap - 6,
        f"cap {size(profile.cap_bytes)}",
        f"cap-text halo {'' if late else 'end'}",
    )
    yield f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    above = min(y, mark) - 9
    if abs(above - cap) < 14:
        above = max(y, mark, cap) + 20
    # Kept off the edges, where half of the letters would be lost.
    anchor = min(x + 8, plane.right) if late else max(x - 8, plane.left + 4)
    yield svg_text(anchor, above, f"peak {size(profile.peak_bytes)}", f"strong halo {'end' if late else ''}")


def comparison_bars(profile: Profile, width: int) -> str:
    """Peak memory of each way of doing the same batch, beside the cap."""
    if not profile.comparisons:
        return ""
    narrow = width < NARROW
    left, right = (2, 2) if narrow else (220, 190)
    row_height, head = (52 if narrow else 36), 34
    height = head + row_height * len(profile.comparisons) + 24
    most = max(profile.cap_bytes, *(way.peak_bytes for way in profile.comparisons))
    scale = (width - left - right) / (most * 1.02)
    bars, texts = [], []
    for index, way in enumerate(profile.comparisons):
        top = head + index * row_height
        y, baseline = (top + 24, top + 17) if narrow else (top + 9, top + 23)
        over = " over" if way.peak_bytes > profile.cap_bytes else ""
        bars.append(
            f'<rect class="way{over}" x="{left}" y="{y}" width="{way.peak_bytes * scale:.1f}" height="18" rx="2"/>'
        )
        texts += _plate(0, baseline, _fitted(way.name, width - 150 if narrow else 212))
        figures = f"{size(way.peak_bytes)} · {duration(way.step_s)}"
        texts += _plate(width, baseline, figures, "number end")
    spans = _spans(width, head, row_height, len(profile.comparisons), 18)
    parts = [
        *_grid_down(most, scale, left, spans),
        *bars,
        *_cap_down(profile.cap_bytes, left + profile.cap_bytes * scale, spans, head - 14, width - right),
        *texts,
    ]
    described = "; ".join(
        f"{way.name}: {size(way.peak_bytes)}, step {duration(way.step_s)}" for way in profile.comparisons
    )
    return svg("ways", width, height, "Peak memory compared with other ways", described, parts)


def _fitted(text: str, pixels: float) -> str:
    letters = int(pixels / _LETTER)
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _plate(x: float, y: float, text: str, kind: str = "") -> list[str]:
    """Text with a background of its own, so that no line runs through a figure."""
    wide = 6.4 * len(text) + 6
    start = x - wide if "end" in kind.split() else x
    return [
        f'<rect class="plate" x="{start:.1f}" y="{y - 13:.1f}" width="{wide:.1f}" height="17"/>',
        svg_text(x, y, text, kind),
    ]
