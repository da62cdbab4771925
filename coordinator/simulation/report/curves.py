"""Curves of the arms as SVG: mean over seeds as a line, smallest to largest as a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from coordinator.simulation.record import Point, Record
from coordinator.simulation.report.comparison import ArmComparison, score
from coordinator.simulation.report.table import count_text
from edge_runtime.html.svg import points_text, svg, svg_text, ticks

#: Colours of the page's style sheet, taken in turn; with dashes, more arms than colours can be told apart.
COLOURS = 8
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 52, 14, 14, 44, 320


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn over.

    Attributes:
        key: word for the drawing's id.
        title: text beside the axis.
        of: function that tells where on the axis a point of a record lies.
        label: function that writes a number of the axis.
    """

    key: str
    title: str
    of: Callable[[Point], float]
    label: Callable[[float], str]


AXES = (
    Axis("rounds", "rounds", lambda point: point.round + 1, lambda value: f"{value:.0f}"),
    Axis("passes", "forward passes of one example", lambda point: point.forward_passes, count_text),
    Axis("bytes", "MiB up", lambda point: point.bytes_up / (1 << 20), lambda value: f"{value:.3g}"),
)


@dataclass(frozen=True)
class Curve:
    """One arm over one axis.

    Attributes:
        name: name of the arm.
        points: x, mean, least and most score of each round that all seeds evaluated.
    """

    name: str
    points: tuple[tuple[float, float, float, float], ...]


def curves(comparison: ArmComparison, axis: Axis) -> list[Curve]:
    """A curve for each arm, empty where nothing was measured."""
    return [
        Curve(arm.name, _points([r for r in comparison.records if r.arm == arm.name], axis))
        for arm in comparison.arms
    ]


def chart(comparison: ArmComparison, axis: Axis, width: int) -> str:
    """The drawing of all arms over one axis; empty if there is no curve."""
    drawn = curves(comparison, axis)
    every = [point for curve in drawn for point in curve.points]
    if not every:
        return ""
    plane = _Plane.around(every, width, percent=comparison.measure == "accuracy")
    parts = _axes(plane, axis)
    for index, curve in enumerate(drawn):
        parts += _band(plane, curve, index)
    for index, curve in enumerate(drawn):
        parts += _line(plane, curve, index)
    described = "; ".join(
        f"{curve.name}: {plane.label(curve.points[-1][1])} at {axis.label(curve.points[-1][0])}"
        for curve in drawn
        if curve.points
    )
    title = f"{comparison.measure.capitalize()} against {axis.title}"
    return svg(f"curve-{axis.key}", width, _HEIGHT, title, described, parts)


def dash(index: int) -> str:
    """The dashes by which an arm differs from another of the same colour."""
    return _DASHES[index // COLOURS % len(_DASHES)]


@dataclass(frozen=True)
class _Plane:
    """Where values lie on the drawing, in pixels.

    Attributes:
        width: width of the drawing in pixels.
        most: largest value of the horizontal axis.
        low: score at the bottom.
        high: score at the top.
        percent: whether scores are written in per cent.
    """

    width: int
    most: float
    low: float
    high: float
    percent: bool

    @classmethod
    def around(
        cls, every: Sequence[tuple[float, float, float, float]], width: int, *, percent: bool
    ) -> _Plane:
        low, high = min(point[2] for point in every), max(point[3] for point in every)
        margin = 0.06 * (high - low) or 0.05
        high = min(1.0, high + margin) if percent else high + margin
        return cls(width, max(point[0] for point in every) or 1.0, max(0.0, low - margin), high, percent)

    def x(self, value: float) -> float:
        return _LEFT + value * (self.width - _LEFT - _RIGHT) / self.most

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.low) * (_HEIGHT - _TOP - _BOTTOM) / (self.high - self.low)

    def label(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.percent else f"{value:.4g}"

    def levels(self) -> list[float]:
        """Round scores within the drawing."""
        step = ticks(self.high - self.low, 5)
        size = step[1] if len(step) > 1 else self.high - self.low
        first = int(self.low / size) + (self.low % size > 0)
        return [number * size for number in range(first, int(self.high / size) + 1)]


def _axes(plane: _Plane, axis: Axis) -> list[str]:
    right, bottom = plane.width - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for level in plane.levels():
        y = plane.y(level)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 7, y + 4, plane.label(level), "muted small end"))
    numbered = ticks(plane.most, 3 if plane.width < 420 else 5)
    for number in numbered:
        place = "end" if plane.x(number) > right - 16 else "middle"
        parts.append(svg_text(plane.x(number), bottom + 17, axis.label(number), f"muted small {place}"))
    parts.append(f'<line class="tick" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(svg_text((_LEFT + right) / 2, bottom + 37, axis.title, "muted small middle"))
    return parts


def _band(plane: _Plane, curve: Curve, index: int) -> list[str]:
    if len(curve.points) < 2 or all(low == high for _, _, low, high in curve.points):
        return []
    upper = [(plane.x(x), plane.y(high)) for x, _, _, high in curve.points]
    lower = [(plane.x(x), plane.y(low)) for x, _, low, _ in reversed(curve.points)]
    return [f'<polygon class="seeds arm-{index % COLOURS}" points="{points_text([*upper, *lower])}"/>']


def _line(plane: _Plane, curve: Curve, index: int) -> list[str]:
    if not curve.points:
        return []
    dashes = f' stroke-dasharray="{dash(index)}"' if dash(index) else ""
    places = [(plane.x(x), plane.y(mean)) for x, mean, _, _ in curve.points]
    end_x, end_y = places[-1]
    colour = f"arm-{index % COLOURS}"
    return [
        f'<polyline class="mean {colour}"{dashes} points="{points_text(places)}"/>',
        f'<circle class="last {colour}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.5"/>',
    ]


def _points(records: Sequence[Record], axis: Axis) -> tuple[tuple[float, float, float, float], ...]:
    by_round: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        for index, point in enumerate(record.points):
            value = score(record, index)
            if value is not None:
                by_round.setdefault(point.round, []).append((axis.of(point), value))
    measured = max((len(found) for found in by_round.values()), default=0)
    points = []
    for number in sorted(by_round):
        found = by_round[number]
        if len(found) == measured:  # elsewhere the mean would jump where a seed ends
            values = [value for _, value in found]
            points.append((fmean(x for x, _ in found), fmean(values), min(values), max(values)))
    return tuple(points)
