"""Curves over rounds: a plane with its axes, and lines on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.html.svg import points_text, svg, svg_text, ticks

WIDE, NARROW = 880, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44
#: Number of kinds of line in the style sheet, which differ in colour and dashes.
_KINDS = 3
#: Largest number of points of a drawn line; and of a line that has a dot at each.
_MOST_POINTS, _MOST_DOTS = 200, 40


@dataclass(frozen=True)
class Plane:
    """Where values lie on a drawing, in pixels.

    Attributes:
        width: width of the drawing.
        height: height of the drawing.
        most: largest value of the horizontal axis.
        low: value at the bottom.
        high: value at the top.
        percent: whether values are shares, written in per cent.
    """

    width: int
    height: int
    most: float
    low: float
    high: float
    percent: bool

    @classmethod
    def around(cls, width: int, height: int, *, most: float, low: float, high: float, percent: bool) -> Plane:
        """A plane with some room around the values from ``low`` to ``high``."""
        margin = 0.06 * (high - low) or 0.05
        top = min(1.0, high + margin) if percent else high + margin
        return cls(width, height, most or 1.0, max(0.0, low - margin), top, percent)

    def x(self, value: float) -> float:
        """Place on the horizontal axis."""
        return _LEFT + value * (self.width - _LEFT - _RIGHT) / self.most

    def y(self, value: float) -> float:
        """Place on the vertical axis."""
        bottom = self.height - _BOTTOM
        return bottom - (value - self.low) * (bottom - _TOP) / (self.high - self.low)

    def label(self, value: float) -> str:
        """A value of the vertical axis as text."""
        return f"{100 * value:.3g} %" if self.percent else f"{value:.4g}"

    def levels(self) -> list[float]:
        """Round values within the drawing."""
        step = ticks(self.high - self.low, 5)
        size = step[1] if len(step) > 1 else self.high - self.low
        first = int(self.low / size) + (self.low % size > 0)
        return [number * size for number in range(first, int(self.high / size) + 1)]


def axes(plane: Plane, title: str, label: Callable[[float], str]) -> list[str]:
    """Both axes of a plane.

    Args:
        plane: the plane.
        title: text below the horizontal axis.
        label: function that writes a number of the horizontal axis.
    """
    right, bottom = plane.width - _RIGHT, plane.height - _BOTTOM
    parts = []
    for level in plane.levels():
        y = plane.y(level)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 7, y + 4, plane.label(level), "muted small end"))
    for number in ticks(plane.most, 3 if plane.width < 420 else 5):
        place = "end" if plane.x(number) > right - 16 else "middle"
        parts.append(svg_text(plane.x(number), bottom + 17, label(number), f"muted small {place}"))
    parts.append(f'<line class="tick" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(svg_text((_LEFT + right) / 2, bottom + 37, title, "muted small middle"))
    return parts


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: what it shows.
        points: its points, from left to right.
    """

    name: str
    points: tuple[tuple[float, float], ...]


def line_kind(index: int) -> str:
    """Class of the line with this index, for the legend."""
    return f"line line-{index % _KINDS}"


def line_chart(key: str, title: str, lines: Sequence[Line], *, height: int, percent: bool = False) -> str:
    """Lines over committed rounds, drawn for a wide and for a narrow screen; empty without any point.

    Args:
        key: word that makes the drawing's element ids unique in a page.
        title: what the vertical axis shows.
        lines: curves in the order of their importance; the first is drawn on top.
        height: height in pixels.
        percent: whether values are shares, written in per cent.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    return "".join(_drawing(key, title, lines, points, (width, height), percent) for width in (WIDE, NARROW))


def _drawing(
    key: str,
    title: str,
    lines: Sequence[Line],
    points: Sequence[tuple[float, float]],
    shape: tuple[int, int],
    percent: bool,
) -> str:
    heights = [y for _, y in points]
    plane = Plane.around(
        *shape, most=max(x for x, _ in points), low=min(heights), high=max(heights), percent=percent
    )
    parts = axes(plane, "committed rounds", lambda value: f"{value:.0f}" if value == int(value) else "")
    for index, line in reversed(list(enumerate(lines))):
        places = [(plane.x(x), plane.y(y)) for x, y in _thinned(line.points)]
        kind = line_kind(index)
        parts.append(f'<polyline class="{kind}" points="{points_text(places)}"/>')
        if len(places) <= _MOST_DOTS:
            parts += [f'<circle class="{kind} dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in places]
    told = "; ".join(
        f"{line.name}: {plane.label(line.points[0][1])} at {line.points[0][0]:g}, "
        f"{plane.label(line.points[-1][1])} at {line.points[-1][0]:g}"
        for line in lines
        if line.points
    )
    return svg(key, *shape, f"{title} over committed rounds", told, parts)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Points a fixed stride apart, the last among them, no more than can be told apart."""
    stride = -(-len(points) // _MOST_POINTS)
    return [*reversed(points[::-1][::stride])] if stride > 1 else points
